"""GPT-OSS (2508.10925): sinks, windows in every other layer, biases everywhere, experts with clamped SwiGLU."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..config import AttentionConfig, ModelConfig, MoEConfig
from . import common
from .family import Family, needs_moe
from .keys import Keys
from .place import Place
from .windows import layer_types

THETA = 150000.0
UNUSED = 128  # transformers asks for a window even where `layer_types` gives it to no layer


def read(keys: Keys) -> ModelConfig:
    keys.only("swiglu_limit", (7.0,), 7.0)
    keys.only("swiglu_alpha", (1.702,), 1.702)
    for said_twice in ("quantization_config", "experts_per_token", "initial_context_length"):
        keys.maybe(said_twice)
    rope = keys.get("rope_parameters", keys.maybe("rope_scaling"))
    bias = keys.get("attention_bias", True)
    theirs: dict[str, Any] = {
        "head_dim": keys.get("head_dim", 64),
        "norm_eps": keys.get("rms_norm_eps", 1e-5),
        "rope_theta": float(rope.get("rope_theta") or keys.get("rope_theta", THETA)),
    }
    return ModelConfig(
        **common.read_sizes(keys) | theirs,
        attention=AttentionConfig(qkv_bias=bias, output_bias=bias, sinks=True, **_windows(keys)),
        moe=MoEConfig(
            width=keys.get("hidden_size"),
            expert_width=keys.get("intermediate_size"),
            num_experts=keys.maybe("num_experts") or keys.get("num_local_experts"),
            top_k=keys.get("num_experts_per_tok", 4),
            router="gpt_oss",
            activation="swiglu_clamped",
            bias=True,
            capacity_factor=None,
            eval_capacity_factor=None,
            balance_loss=float(keys.get("router_aux_loss_coef", 0.001)),
            z_loss=0.0,
            every=1,
        ),
    )


def _windows(keys: Keys) -> dict[str, Any]:
    """AttentionConfig's arguments: without `layer_types` the first layer has a window, the second none, and so on."""
    size, kinds = keys.maybe("sliding_window"), keys.maybe("layer_types")
    layers = range(keys.get("num_hidden_layers"))
    chosen = tuple(i for i in layers if (kinds[i] == "sliding_attention" if kinds else i % 2 == 0))
    return {"window": size, "window_layers": chosen} if size and chosen else {}


def write(cfg: ModelConfig) -> dict[str, Any]:
    moe = needs_moe(cfg)
    return {
        **common.write_sizes(cfg),
        "attention_bias": cfg.attention.qkv_bias,
        "sliding_window": cfg.attention.window or UNUSED,
        "layer_types": layer_types(cfg),
        "intermediate_size": moe.expert_width,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.balance_loss,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    }


def places(cfg: ModelConfig) -> Iterator[Place]:
    moe = needs_moe(cfg)
    experts, hidden, width = moe.num_experts, moe.expert_width, cfg.width
    yield from common.ends(cfg)
    for layer in range(cfg.layers):
        theirs, ours = f"{common.LAYER}.{layer}", f"blocks.{layer}"
        yield from common.norms(layer)
        yield from common.attention(cfg, layer)
        yield Place(f"{theirs}.self_attn.sinks", f"{ours}.attention.sinks")
        for leaf in ("weight", "bias"):
            yield Place(f"{theirs}.mlp.router.{leaf}", f"{ours}.ffn.router.{leaf}")
        theirs, ours = f"{theirs}.mlp.experts", f"{ours}.ffn.experts"
        yield Place(f"{theirs}.gate_up_proj", f"{ours}.w_in", _in_turn, (experts, width, 2 * hidden))
        yield Place(f"{theirs}.gate_up_proj_bias", f"{ours}.b_in", _in_turn, (experts, 2 * hidden))
        yield Place(f"{theirs}.down_proj", f"{ours}.w_out")
        yield Place(f"{theirs}.down_proj_bias", f"{ours}.b_out")


def _in_turn(tensor: Tensor) -> Tensor:
    """[E, D, F, 2] of [E, 2F, D], [E, F, 2] of [E, 2F]: a gate, what it gates, the next gate."""
    halves = tensor.unflatten(1, (2, -1))
    return halves.movedim(1, -1) if tensor.ndim == 2 else halves.permute(0, 3, 2, 1)


GPT_OSS = Family(
    name="gpt_oss", architecture="GptOssForCausalLM", read=read, write=write, places=places, packed="mxfp4"
)  # fmt: skip
