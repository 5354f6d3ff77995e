"""A small dense Llama in Hugging Face's form, with a tokenizer of its own: a stranger's checkpoint."""

from pathlib import Path

import torch

from turnout.moe.config import ModelConfig
from turnout.moe.data.tokenizer import Tokenizer, train_tokenizer
from turnout.moe.families.directory import save_foreign
from turnout.moe.models.decoder import Decoder

TEXT = "the quick brown fox jumps over the lazy dog while five wizards judge a box of quartz. "


def llama(directory: Path, tokenizer: Tokenizer | None = None, **changes: object) -> Path:
    """Write it to `directory`: 4 blocks, 32 wide, the tokenizer's vocabulary, weights that all matter."""
    tokenizer = tokenizer or train_tokenizer([TEXT * 20], 300)
    sizes = {
        "vocab_size": tokenizer.vocab_size, "width": 32, "layers": 4, "heads": 2, "kv_heads": 1, "head_dim": 16,
        "ffn_width": 48, "max_seq_len": 64, "eos_token_id": tokenizer.eos_id,
    }  # fmt: skip
    cfg = ModelConfig(**{**sizes, **changes})
    model = Decoder(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.2 if weight.ndim > 1 else 0.3))
            if weight.ndim == 1:
                weight.add_(1)
    tokenizer.save(directory.with_name(f"{directory.name}-tokenizer"))
    beside = directory.with_name(f"{directory.name}-tokenizer")
    return save_foreign(directory, cfg, dict(model.state_dict()), "llama", beside=beside)
