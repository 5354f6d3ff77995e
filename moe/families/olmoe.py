"""OLMoE (2409.02060): every block sparse, queries and keys normalised over all heads, then clamped."""

from typing import Any

from ..config import AttentionConfig, ModelConfig
from . import common, sparse
from .family import Family, needs_moe
from .keys import Keys

WIDTH = "intermediate_size"


def read(keys: Keys) -> ModelConfig:
    bias = keys.get("attention_bias", False)
    return ModelConfig(
        **common.read_sizes(keys, norm_eps=1e-5),
        attention=AttentionConfig(qk_norm="width", qkv_bias=bias, output_bias=bias, clip=keys.maybe("clip_qkv")),
        moe=sparse.read_moe(keys, width=WIDTH, renormalize=keys.get("norm_topk_prob", False), loss=1e-2),
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    moe = needs_moe(cfg)
    return {
        **common.write_sizes(cfg),
        **sparse.write_moe(moe, width=WIDTH),
        "attention_bias": cfg.attention.qkv_bias,
        "clip_qkv": cfg.attention.clip,
        "norm_topk_prob": moe.renormalize,
    }


OLMOE = Family(
    name="olmoe", architecture="OlmoeForCausalLM", read=read, write=write, places=sparse.places,
)  # fmt: skip
