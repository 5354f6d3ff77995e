"""Llama 1 to 3 and what has their form (SmolLM2, TinyLlama), and Mistral with its window: dense decoders."""

from collections.abc import Iterator
from typing import Any

from ..config import AttentionConfig, ModelConfig
from . import common
from .family import Family
from .keys import Keys
from .place import Place


def read(keys: Keys) -> ModelConfig:
    for name in ("mlp_bias", "rope_interleaved"):
        keys.only(name, (False,), False)
    bias = keys.get("attention_bias", False)
    return ModelConfig(**common.read_sizes(keys), attention=AttentionConfig(qkv_bias=bias, output_bias=bias))


def write(cfg: ModelConfig) -> dict[str, Any]:
    return {**common.write_sizes(cfg), "attention_bias": cfg.attention.qkv_bias, "mlp_bias": False}


def read_mistral(keys: Keys) -> ModelConfig:
    window = keys.maybe("sliding_window") if "sliding_window" in keys.data else keys.get("sliding_window", 4096)
    return ModelConfig(**common.read_sizes(keys), attention=AttentionConfig(window=window))


def write_mistral(cfg: ModelConfig) -> dict[str, Any]:
    return {**common.write_sizes(cfg), "sliding_window": cfg.attention.window}


def places(cfg: ModelConfig) -> Iterator[Place]:
    yield from common.ends(cfg)
    for layer in range(cfg.layers):
        yield from common.norms(layer)
        yield from common.attention(cfg, layer)
        yield from common.gated(f"{common.LAYER}.{layer}.mlp", f"blocks.{layer}.ffn", cfg.ffn_width)


LLAMA = Family(
    name="llama", architecture="LlamaForCausalLM", read=read, write=write, places=places,
)  # fmt: skip
MISTRAL = Family(
    name="mistral", architecture="MistralForCausalLM", read=read_mistral, write=write_mistral, places=places,
)  # fmt: skip
