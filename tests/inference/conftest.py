"""What the engine's tests share: a small real tokenizer, and small models whose outputs differ clearly.

A model of a few thousand random weights has near-ties everywhere; with large weights its logits spread over tens of
nats, so that equal tokens mean equal computation and not luck.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from turnout.inference.config import EngineConfig
from turnout.inference.engine import Engine
from turnout.inference.text.tokenizer import TextTokenizer
from turnout.moe import Decoder, ModelConfig, MoEConfig, save_model
from turnout.moe.attention_config import AttentionConfig, EncoderConfig
from turnout.moe.models.init import init_weights

SAMPLE = [
    "The import statement combines two operations; it searches for the named module, then it binds the results.",
    "naïve café, Grüße, 日本語のテキスト, 한국어, emoji 👩‍👩‍👧‍👦 and 👍🏽 and 🏳️‍🌈.",
    "def push(self, token_id: int) -> str:\n    return self._decoder.decode(data)\n",
]
SPECIAL = "<|endoftext|>"


@pytest.fixture(scope="session")
def byte_level() -> TextTokenizer:
    """Byte-level BPE with few merges, so that most characters outside ASCII are spread over several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[SPECIAL], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.add_tokens(["<tool call>"])  # not special, and with a blank that byte-level BPE would not spell so
    return TextTokenizer(tokenizer)


def build_model(router: str = "switch", heads: int = 4, kv_heads: int = 2, seed: int = 0, **changes: Any) -> Decoder:
    """Four blocks, two of them with 4 experts, in evaluation mode; `router=None` gives a dense model."""
    top_k = {"switch": 1, "gshard": 2}.get(router, 1)
    moe = MoEConfig(width=32, expert_width=32, num_experts=4, top_k=top_k, router=router, init_scale=3.0)
    values = {
        "vocab_size": 321, "width": 32, "layers": 4, "heads": heads, "kv_heads": kv_heads, "head_dim": 8,
        "ffn_width": 64, "max_seq_len": 256, "tie_embeddings": False, "moe": moe,
    }  # fmt: skip
    model = Decoder(ModelConfig(**(values | changes)))
    init_weights(model, seed)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Decoder]:
    return build_model


@pytest.fixture(scope="session")
def model() -> Decoder:
    return build_model()


@pytest.fixture(scope="session")
def t5() -> Decoder:
    """An encoder-decoder of T5's kind: relative positions, no gate, sparse blocks in both stacks (1; 3 and 4)."""
    model = build_model(
        layers=2, kv_heads=4, seed=3, activation="relu", attention=AttentionConfig(positions="relative"),
        encoder=EncoderConfig(layers=3, start_token_id=5, sparse_layers=(1, 2)),
    )  # fmt: skip
    with torch.no_grad():
        for block in model.blocks:
            block.cross.wo.weight.mul_(4)  # so that the input decides
    return model


@pytest.fixture
def make_engine(model: Decoder, byte_level: TextTokenizer) -> Iterator[Callable[..., Engine]]:
    """Engines of small pools; after the test none may hold a block or a request."""
    engines = []

    def make(of: Decoder | None = None, **config: Any) -> Engine:
        sizes = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        engines.append(Engine(of or model, byte_level, EngineConfig(**(sizes | config))))
        return engines[-1]

    yield make
    for engine in engines:
        stats = engine.stats()
        assert not engine.has_unfinished
        assert (stats.running, stats.waiting, stats.usage) == (0, 0, 0)
        assert not engine._ledger.choices


@pytest.fixture(scope="session")
def model_dir(model: Decoder, byte_level: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a servable directory."""
    return _servable(model, byte_level, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def t5_dir(t5: Decoder, byte_level: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder-decoder as a servable directory."""
    return _servable(t5, byte_level, tmp_path_factory.mktemp("t5"))


def _servable(model: Decoder, tokenizer: TextTokenizer, folder: Path) -> Path:
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    return save_model(folder / "model", model.cfg, model.state_dict(), folder)
