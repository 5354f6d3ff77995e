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
from ..data.rows import Batch, Source
from ..models.context import VarlenContext
from ..routing.record import Decision, RouteContext, Routing

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
        source: the arguments of an encoder; None without one.
    """

    tokens_T: Tensor
    targets_T: Tensor
    positions_A: Tensor
    valid_T: Tensor
    ctx: VarlenContext
    total_tokens: int
    source: tuple[Tensor, Tensor, VarlenContext] | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The model's arguments."""
        own = (self.tokens_T, self.positions_A, self.ctx)
        return own if self.source is None else (*own, self.source)

    @property
    def routings(self) -> dict[int, Routing]:
        """Layer id → its routing, after the forward pass; of the encoder's layers too."""
        return self.ctx.routings if self.source is None else {**self.ctx.routings, **self.source[2].routings}


def part_of(
    batch: Batch, mesh: Mesh, replay: Decisions | None = None, *, propagate_nan: bool = True, **route: Any
) -> Part:
    """This rank's part of its data-parallel rank's micro-batch. `route` completes the `RouteContext`."""
    here = _tensors(batch, mesh)
    common: dict[str, Any] = {"propagate_nan": propagate_nan, **route}
    if mesh.size("stage") > 1:
        common["reducer"] = lambda tensor: mesh.sum(tensor, "stage")
    context = RouteContext(
        cu_groups=here["cu_rows"],
        valid_T=here["valid_T"],
        token_ids_T=here["tokens_T"],
        index_T=here["index_T"],
        total_tokens=batch.total_tokens,
        **common,
    )
    source = None if batch.source is None else _source_of(batch.source, mesh, common)
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
        ctx=VarlenContext(
            here["cu_seqlens"], route=context, spread=spread, cu_memory_B1=source[2].cu_seqlens_B1 if source else None
        ),
        total_tokens=batch.total_tokens,
        source=source,
    )


def _source_of(source: Source, mesh: Mesh, common: dict[str, Any]) -> tuple[Tensor, Tensor, VarlenContext]:
    """The encoder's arguments: its layers route and balance over tokens of their own."""
    here = _tensors(source, mesh)
    context = RouteContext(
        cu_groups=here["cu_rows"],
        token_ids_T=here["tokens_S"],
        index_T=here["index_S"],
        total_tokens=source.total_tokens,
        **common,
    )
    return here["tokens_S"], here["positions_S"], VarlenContext(here["cu_rows"], route=context)


def _tensors(batch: Batch | Source, mesh: Mesh) -> dict[str, Tensor]:
    """The tensors of a batch on the rank's device."""
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {
        name: value.to(mesh.device, non_blocking=True) for name, value in found.items() if isinstance(value, Tensor)
    }
