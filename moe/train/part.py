"""A rank's part of a micro-batch: the tokens that it computes on, and what its layers must know about the others.

T tokens held here, A tokens that attention computes here: the same, unless tensor parallelism divides tokens between
layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...parallel.mesh import Mesh
from ...parallel.spread import Spread
from ..data.rows import Batch
from ..models.context import VarlenContext
from ..routing.record import Decision, RouteContext

# token indices and ids → layer → the decisions to take
Decisions = Callable[[Tensor, Tensor], Mapping[int, Decision]]


@dataclass(frozen=True)
class Part:
    """What the model is called with, and what its loss is about.

    Attributes:
        tokens_T, targets_T: int64 ids of the tokens held here and of those that follow (-1 for padding).
        positions_A: int64, of the tokens that attention computes here.
        valid_T: bool, False for padding.
        ctx: attention and routing.
        total_tokens: valid targets of the GLOBAL batch, the loss's denominator.
    """

    tokens_T: Tensor
    targets_T: Tensor
    positions_A: Tensor
    valid_T: Tensor
    ctx: VarlenContext
    total_tokens: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor, VarlenContext]:
        """The model's arguments."""
        return self.tokens_T, self.positions_A, self.ctx


def part_of(
    batch: Batch, mesh: Mesh, replay: Decisions | None = None, *, propagate_nan: bool = True, **route: Any
) -> Part:
    """This rank's part of its data-parallel rank's micro-batch. `route` completes the `RouteContext`."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "total_tokens"}
    here = {name: tensor.to(mesh.device, non_blocking=True) for name, tensor in tensors.items()}
    context = RouteContext(
        cu_groups=here["cu_rows"],
        valid_T=here["valid_T"],
        token_ids_T=here["tokens_T"],
        index_T=here["index_T"],
        total_tokens=batch.total_tokens,
        reducer=(lambda tensor: mesh.sum(tensor, "stage")) if mesh.size("stage") > 1 else None,
        propagate_nan=propagate_nan,
        **route,
    )
    spread = Spread.of(mesh, len(batch.tokens_T)) if mesh.size("row") > 1 else None
    if spread is not None:
        own = {name: here[name][spread.own_T] for name in ("tokens_T", "targets_T", "valid_T", "index_T")}
        here |= own | {"positions_T": here["positions_T"][spread.attended_A]}
        context = replace(
            context,
            cu_groups=torch.searchsorted(spread.own_T, here["cu_rows"]),
            valid_T=here["valid_T"],
            token_ids_T=here["tokens_T"],
            index_T=here["index_T"],
            spread=spread,
            whole=context,
        )
    if replay is not None:
        context = replace(context, replay=replay(here["index_T"], here["tokens_T"]))
    return Part(
        tokens_T=here["tokens_T"],
        targets_T=here["targets_T"],
        positions_A=here["positions_T"],
        valid_T=here["valid_T"],
        ctx=VarlenContext(here["cu_seqlens"], route=context, spread=spread),
        total_tokens=batch.total_tokens,
    )
