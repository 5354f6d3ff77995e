"""What the Llama-like mixtures of experts share: a softmax router, experts in a list, which blocks are sparse."""

from collections.abc import Iterator
from typing import Any

from ..config import ModelConfig, MoEConfig
from . import common
from .keys import Keys
from .place import Place


def read_moe(keys: Keys, *, width: str, renormalize: bool, loss: float, **more: Any) -> MoEConfig:
    """A softmax over all experts, of which each token keeps the largest; none is dropped.

    Args:
        keys: their configuration.
        width: their name for an expert's hidden width.
        renormalize: divide the kept weights by their sum.
        loss: the default of `router_aux_loss_coef`.
        more: MoEConfig's other arguments.
    """
    return MoEConfig(
        width=keys.get("hidden_size"),
        expert_width=keys.get(width),
        num_experts=keys.maybe("num_local_experts") or keys.get("num_experts"),
        top_k=keys.get("num_experts_per_tok"),
        router="topk_softmax",
        renormalize=renormalize,
        capacity_factor=None,
        eval_capacity_factor=None,
        balance_loss=float(keys.get("router_aux_loss_coef", loss)),
        z_loss=0.0,
        **({"every": 1} | more),
    )


def write_moe(moe: MoEConfig, *, width: str, experts: str = "num_experts") -> dict[str, Any]:
    """The keys that `read_moe` reads; `experts` is their name for how many there are."""
    return {
        experts: moe.num_experts,
        width: moe.expert_width,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.balance_loss,
    }


def read_blocks(keys: Keys) -> dict[str, Any]:
    """MoEConfig's arguments for `decoder_sparse_step` and `mlp_only_layers` (Qwen)."""
    step, dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    layers = range(keys.get("num_hidden_layers"))
    if not dense:
        return {"every": step}
    return {"sparse_layers": tuple(i for i in layers if i not in dense and (i + 1) % step == 0)}


def write_blocks(cfg: ModelConfig) -> dict[str, Any]:
    """The keys that `read_blocks` reads."""
    assert cfg.moe is not None
    if cfg.moe.sparse_layers is None and cfg.moe.first_dense == 0:
        return {"decoder_sparse_step": cfg.moe.every, "mlp_only_layers": []}
    dense = [layer for layer in range(cfg.layers) if layer not in cfg.moe_layers]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def places(
    cfg: ModelConfig, mlp: str = "mlp", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Place]:
    """A decoder with Llama's attention whose sparse blocks are called `mlp`, their experts' matrices `names`."""
    assert cfg.moe is not None
    yield from common.ends(cfg)
    for layer in range(cfg.layers):
        theirs, ours = f"{common.LAYER}.{layer}", f"blocks.{layer}.ffn"
        yield from common.norms(layer)
        yield from common.attention(cfg, layer)
        if layer not in cfg.moe_layers:
            yield from common.gated(f"{theirs}.mlp", ours, cfg.ffn_width)
            continue
        yield Place(f"{theirs}.{mlp}.gate.weight", f"{ours}.router.weight")
        yield from common.experts(f"{theirs}.{mlp}.experts", ours, cfg, names)
        if cfg.moe.shared_experts:
            hidden = cfg.moe.shared_width or cfg.moe.shared_experts * cfg.moe.expert_width
            yield from common.gated(f"{theirs}.{mlp}.shared_expert", f"{ours}.shared", hidden)
        if cfg.moe.shared_gate:
            yield Place(f"{theirs}.{mlp}.shared_expert_gate.weight", f"{ours}.shared_gate.weight")
