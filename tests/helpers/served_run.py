"""A run directory with a small random mixture of experts, to be served."""

from pathlib import Path

from turnout.moe import Decoder, ModelConfig, MoEConfig, save_model
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.models.init import init_weights

TEXT = "The list of the things that are imported."


def make_run(run: Path, max_seq_len: int = 1024) -> Path:
    """Two layers, four experts, and a tokenizer, at `run`."""
    tokenizer = train_tokenizer([TEXT], 280)
    tokenizer.save(run / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn_width=64,
        max_seq_len=max_seq_len, moe=MoEConfig(width=32, expert_width=32, num_experts=4),
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, 0)
    save_model(run / "model", config, model.state_dict(), run / "tokenizer")
    return run
