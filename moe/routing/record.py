"""The routing decision and its surroundings, as immutable data.

A router returns one `Routing`; dispatch, losses, metrics and serving read it, and nothing routes twice.

T tokens, E experts, K choices, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, kw_only=True)
class RouteContext:
    """What a router must know besides the hidden states. The default is one group of valid tokens.

    Attributes:
        cu_groups: int [G+1], token offsets of the groups whose capacity is shared and whose balance is measured (in
            training a packed row, in evaluation and serving a sequence); None = all tokens are one group.
        valid_T: bool, False for padding, which routes nowhere; None = all valid.
        token_ids_T: int, the input ids (hash routing, tracing).
        index_T: int64, global token index that keys random numbers, so that every layout draws the same; None = 0..T-1.
        step: optimizer step, also a key of the random numbers.
        seed: the run's seed.
        total_tokens: valid tokens of the GLOBAL batch, the divisor of every loss; None = those at hand.
        dropless: ignore every capacity (serving's default).
        reducer: sums a tensor over the data-parallel ranks (statistics over the global batch); None = one rank.
    """

    cu_groups: Tensor | None = None
    valid_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    index_T: Tensor | None = None
    step: int = 0
    seed: int = 0
    total_tokens: int | None = None
    dropless: bool = False
    reducer: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One layer's decision for T tokens.

    Attributes:
        ids_TK: int64, chosen experts, best first.
        weights_TK: float32 gate values that multiply the experts' outputs; they carry the router's gradient.
        kept_TK: bool, False where the capacity overflowed, a second choice was not drawn, or the token is padding.
        counts_E: int64, assignments of valid tokens to each expert, before drops.
        probs_TE: float32 router probabilities.
        logits_TE: float32 router logits.
        aux: name → this rank's part of each loss over the global batch, before its coefficient (`balance`, `z`).
    """

    ids_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    counts_E: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)


def _flatten(routing: Routing) -> tuple[list[Any], None]:
    return [getattr(routing, f.name) for f in fields(Routing)], None


def _unflatten(values: Any, _context: None) -> Routing:
    return Routing(**dict(zip((f.name for f in fields(Routing)), values, strict=True)))


pytree.register_pytree_node(Routing, _flatten, _unflatten, serialized_type_name="turnout.Routing")


def group_starts(context: RouteContext, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The groups as (cu_groups [G+1] int64, group id of each token [T] int64)."""
    if context.cu_groups is None:
        return torch.tensor([0, tokens], device=device), torch.zeros(tokens, dtype=torch.int64, device=device)
    cu = context.cu_groups.to(device=device, dtype=torch.int64)
    group_T = torch.repeat_interleave(torch.arange(cu.numel() - 1, device=device), cu.diff(), output_size=tokens)
    return cu, group_T
