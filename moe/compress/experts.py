"""Fewer experts: the most useful of every layer stay as they are, the others go. E experts, K choices.

A token whose expert is gone goes to the next best; the softmax of routers that do not renormalise is over the experts
that are left, so that their gates grow. The layers that come after are best calibrated on what this one then computes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ... import NonFiniteError
from ...configs.typed import check
from ..config import ModelConfig, MoEConfig
from ..layers.block import Block
from ..layers.moe import MoE
from .routed import Routed

Score = Literal["load", "gate", "output"]
BY_EXPERT = ("experts.", "router.")  # whose tensors have one row or matrix an expert


def fewer(cfg: MoEConfig, experts: int) -> MoEConfig:
    """The configuration of a layer with so many experts.

    A dense mixture still asks all. What is undefined or impossible where every expert is chosen (load_loss, reroute)
    goes.

    Raises:
        ConfigError: more experts than there are, fewer than a token chooses, or not equally many in each group.
    """
    groups = cfg.expert_groups
    scored = 2 if cfg.router == "deepseek_v3" and groups > 1 else 1  # experts by which a group is judged
    least = 1 if cfg.router == "dense" else groups * max(-(-cfg.top_k // cfg.top_groups), scored)
    rule = f"must lie in {least} to {cfg.num_experts} where a token has moe.top_k ({cfg.top_k})"
    check(least <= experts <= cfg.num_experts, "num_experts", experts, rule, f"use num_experts={least}")
    for name, parts in (("expert_groups", groups), ("device_groups", cfg.device_groups)):
        rule, fix = f"must be a multiple of moe.{name} ({parts})", f"use {-(-experts // parts) * parts}"
        check(experts % parts == 0, "num_experts", experts, rule, fix)
    top_k = experts if cfg.router == "dense" else cfg.top_k
    return replace(
        cfg, num_experts=experts, top_k=top_k, reroute=min(cfg.reroute, experts - top_k),
        load_loss=cfg.load_loss if top_k < experts else 0.0,
    )  # fmt: skip


def fewer_experts(cfg: ModelConfig, experts: int) -> ModelConfig:
    """The configuration of a model with so many experts in every sparse block.

    Raises:
        ConfigError: a dense model, or as `fewer`.
    """
    rule, fix = "is dense and has no experts to choose from", "use method=channels, or a sparse model"
    check(cfg.moe is not None, "model.moe", None, rule, fix)
    assert cfg.moe is not None
    return replace(cfg, moe=fewer(cfg.moe, experts))


def score(moe: MoE, routed: Routed, by: Score = "output") -> Tensor:
    """float64 [E]: how much each expert is used.

    Args:
        by: `load`, the tokens that it computed; `gate`, the sum of their gates; `output`, Σ ‖gate · E(x)‖², the squared
            change of the layer's output where its part is left out.
    """
    if by == "output":
        return routed.energy_E(moe)
    return routed.load_E if by == "load" else routed.gate_E


def highest(score_E: Tensor, cfg: MoEConfig, experts: int) -> Tensor:
    """int64 ids, ascending, of the experts that score highest, equally many in each of the router's groups.

    Of equal scores the lower id stays.
    """
    groups, size = cfg.expert_groups, cfg.num_experts // cfg.expert_groups
    order_GE = score_E.unflatten(0, (groups, size)).argsort(dim=-1, descending=True, stable=True)
    first_G1 = torch.arange(0, cfg.num_experts, size)[:, None]
    return (order_GE[:, : experts // groups] + first_G1).flatten().sort().values


def keep_experts(moe: MoE, kept: Tensor) -> MoE:
    """The layer with the experts `kept` (int64 ids, ascending), their router rows and biases.

    Raises:
        ConfigError: as `fewer`, and for a hash router: a token's expert is its id's hash modulo E, which no choice of
            experts leaves in place. NonFiniteError: a weight is not a number.
    """
    rule, fix = "has no rows that could go with an expert", "merge the experts instead"
    check(moe.cfg.router != "hash" or len(kept) == moe.cfg.num_experts, "moe.router", "hash", rule, fix)
    tensors = finite(moe)
    return rebuilt(moe, fewer(moe.cfg, len(kept)), {name: tensor[kept] for name, tensor in of_experts(tensors)})


def prune_experts(block: Block, experts: int, routed: Routed, by: Score = "output") -> dict[str, Any]:
    """Keep so many experts of the sparse block, in place.

    Returns:
        kept: their ids; load_kept: the share of calibration's assignments that was theirs; unseen: the ids, kept or
        not, of experts that calibration sent nothing.

    Raises:
        ConfigError, NonFiniteError: as `keep_experts`.
    """
    moe = block.ffn
    assert isinstance(moe, MoE)
    fewer(moe.cfg, experts)
    kept, load_E = highest(score(moe, routed, by), moe.cfg, experts), routed.load_E
    block.ffn = keep_experts(moe, kept)
    share = float(load_E[kept].sum() / load_E.sum())
    return {"kept": kept.tolist(), "load_kept": share, "unseen": (load_E == 0).nonzero().flatten().tolist()}


def of_experts(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Those that have one part an expert."""
    return [(name, tensor) for name, tensor in tensors.items() if name.startswith(BY_EXPERT)]


def finite(moe: MoE) -> dict[str, Tensor]:
    """The layer's tensors by name.

    Raises:
        NonFiniteError: a weight is not a number.
    """
    tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in moe.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{name} of layer {moe.router.layer} must be numbers: look for a diverged weight")
    return tensors


def rebuilt(moe: MoE, cfg: MoEConfig, changed: Mapping[str, Tensor]) -> MoE:
    """A layer of `cfg` that has the tensors of `moe`, those that are `changed` in their new form."""
    with torch.device("meta"):
        made = MoE(cfg, moe.router.layer)
    made.load_state_dict({**moe.state_dict(), **changed}, assign=True)
    return made.train(moe.training).requires_grad_(next(moe.parameters()).requires_grad)
