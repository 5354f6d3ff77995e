"""Mixtral (2401.04088): every block sparse, the kept experts' weights renormalised, one window for all layers."""

from typing import Any

from ..config import AttentionConfig, ModelConfig
from . import common, sparse
from .family import Family, needs_moe
from .keys import Keys

WIDTH = "intermediate_size"


def read(keys: Keys) -> ModelConfig:
    jitter = float(keys.get("router_jitter_noise", 0.0))
    return ModelConfig(
        **common.read_sizes(keys, norm_eps=1e-5, theta=1e6),
        attention=AttentionConfig(window=keys.maybe("sliding_window")),
        moe=sparse.read_moe(keys, width=WIDTH, renormalize=True, loss=1e-3, jitter=jitter),
    )


def write(cfg: ModelConfig) -> dict[str, Any]:
    moe = needs_moe(cfg)
    return {
        **common.write_sizes(cfg),
        **sparse.write_moe(moe, width=WIDTH, experts="num_local_experts"),
        "sliding_window": cfg.attention.window,
        "router_jitter_noise": moe.jitter,
    }


MIXTRAL = Family(
    name="mixtral", architecture="MixtralForCausalLM", read=read, write=write,
    places=lambda cfg: sparse.places(cfg, "block_sparse_moe", ("w1", "w3", "w2")),
)  # fmt: skip
