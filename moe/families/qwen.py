"""Qwen2 and Qwen2-MoE (2407.10671), Qwen3 and Qwen3-MoE (2505.09388)."""

from typing import Any

from ...configs.typed import check
from ..config import AttentionConfig, ModelConfig
from . import common, llama, sparse
from .family import Family, needs_moe
from .keys import Keys
from .windows import layer_types, read_windows, write_windows

WIDTH = "moe_intermediate_size"


def read_qwen2(keys: Keys) -> ModelConfig:
    return ModelConfig(**common.read_sizes(keys), attention=AttentionConfig(qkv_bias=True, **_upper(keys)))


def write_qwen2(cfg: ModelConfig) -> dict[str, Any]:
    return {**common.write_sizes(cfg), **_by_layer(cfg)}


def read_qwen2_moe(keys: Keys) -> ModelConfig:
    most = keys.get("max_window_layers", 28)
    windows = read_windows(keys, lambda layer: layer % 2 == 0 and layer < most)
    renormalize = keys.get("norm_topk_prob", False)
    shared = {
        "shared_experts": 1, "shared_width": keys.get("shared_expert_intermediate_size"), "shared_gate": True,
    }  # fmt: skip
    return ModelConfig(
        **common.read_sizes(keys),
        attention=AttentionConfig(qkv_bias=keys.get("qkv_bias", True), **windows),
        moe=sparse.read_moe(
            keys, width=WIDTH, renormalize=renormalize, loss=1e-3, **sparse.read_blocks(keys), **shared
        ),
    )


def write_qwen2_moe(cfg: ModelConfig) -> dict[str, Any]:
    moe = needs_moe(cfg)
    shared, rule = moe.shared_experts, "must be at least 1 in a qwen2_moe, which always has a shared expert"
    check(shared > 0, "moe.shared_experts", shared, rule, "choose another family")
    return {
        **common.write_sizes(cfg),
        **sparse.write_moe(moe, width=WIDTH),
        **sparse.write_blocks(cfg),
        **_by_layer(cfg),
        "qkv_bias": cfg.attention.qkv_bias,
        "norm_topk_prob": moe.renormalize,
        "shared_expert_intermediate_size": moe.shared_width or moe.shared_experts * moe.expert_width,
    }


def read_qwen3(keys: Keys) -> ModelConfig:
    return ModelConfig(**common.read_sizes(keys, head_dim=128), attention=_by_head(keys, _upper(keys)))


def write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
    return {**common.write_sizes(cfg), **_by_layer(cfg), "attention_bias": cfg.attention.qkv_bias}


def read_qwen3_moe(keys: Keys) -> ModelConfig:
    keys.maybe("max_window_layers")  # written by them, read by nobody
    renormalize = keys.get("norm_topk_prob", False)
    return ModelConfig(
        **common.read_sizes(keys),
        attention=_by_head(keys, read_windows(keys)),
        moe=sparse.read_moe(keys, width=WIDTH, renormalize=renormalize, loss=1e-3, **sparse.read_blocks(keys)),
    )


def write_qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
    moe = needs_moe(cfg)
    return {
        **common.write_sizes(cfg),
        **sparse.write_moe(moe, width=WIDTH),
        **sparse.write_blocks(cfg),
        **write_windows(cfg),
        "attention_bias": cfg.attention.qkv_bias,
        "norm_topk_prob": moe.renormalize,
    }


def _upper(keys: Keys) -> dict[str, Any]:
    """Windows in the layers from `max_window_layers` on."""
    most = keys.get("max_window_layers", 28)
    return read_windows(keys, lambda layer: layer >= most)


def _by_layer(cfg: ModelConfig) -> dict[str, Any]:
    return {**write_windows(cfg), "layer_types": layer_types(cfg), "max_window_layers": cfg.layers}


def _by_head(keys: Keys, windows: dict[str, Any]) -> AttentionConfig:
    bias = keys.get("attention_bias", False)
    return AttentionConfig(qk_norm="head", qkv_bias=bias, output_bias=bias, **windows)


QWEN2 = Family(
    name="qwen2", architecture="Qwen2ForCausalLM", read=read_qwen2, write=write_qwen2,
    places=llama.places,
)  # fmt: skip
QWEN2_MOE = Family(
    name="qwen2_moe", architecture="Qwen2MoeForCausalLM", read=read_qwen2_moe, write=write_qwen2_moe,
    places=sparse.places,
)  # fmt: skip
QWEN3 = Family(
    name="qwen3", architecture="Qwen3ForCausalLM", read=read_qwen3, write=write_qwen3,
    places=llama.places,
)  # fmt: skip
QWEN3_MOE = Family(
    name="qwen3_moe", architecture="Qwen3MoeForCausalLM", read=read_qwen3_moe, write=write_qwen3_moe,
    places=sparse.places,
)  # fmt: skip
