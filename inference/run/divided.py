"""A step's tokens divided between tensor-parallel ranks, as in training: between the layers each has its own.

Attention and dense feed-forward layers gather all of them (parallel/tensor.py), so slots, tables and positions are
those of all tokens. There must be as many tokens on every rank, so some are padding: they route nowhere, write to the
null block and read nothing else.

T tokens of all ranks, P of them padding, B requests, M blocks.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...moe.routing.record import Decision, RouteContext
from ...parallel.mesh import Mesh
from ...parallel.spread import Spread
from ..core.step import StepPlan
from .batch import Batch
from .context import PagedContext
from .kv import KVCache


def padded(batch: Batch, pieces: int) -> Batch:
    """With tokens to a multiple of `pieces`, each of the padding a sequence of its own in the null block."""
    count = -len(batch.tokens_T) % pieces
    if count == 0:
        return batch
    ends = batch.cu_q_B1[-1:] + torch.arange(1, count + 1, dtype=torch.int32, device=batch.cu_q_B1.device)
    return replace(
        batch,
        tokens_T=F.pad(batch.tokens_T, (0, count)),
        positions_T=F.pad(batch.positions_T, (0, count)),
        slots_T=F.pad(batch.slots_T, (0, count)),
        block_tables_BM=F.pad(batch.block_tables_BM, (0, 0, 0, count)),
        context_lens_B=F.pad(batch.context_lens_B, (0, count), value=1),
        cu_q_B1=torch.cat([batch.cu_q_B1, ends]),
        valid_T=F.pad(torch.ones_like(batch.tokens_T, dtype=torch.bool), (0, count)),
    )


class DividedContext(PagedContext):
    """The surroundings of this rank's share of a padded batch."""

    def __init__(self, batch: Batch, cache: KVCache, mesh: Mesh, taken: Mapping[int, Tensor] | None) -> None:
        super().__init__(batch, cache, taken=taken)
        self._spread = Spread.of(mesh, len(batch.tokens_T))
        own_T = self._spread.own_T
        self.route: RouteContext = replace(
            self.route,
            cu_groups=torch.searchsorted(own_T, batch.cu_q_B1.long()),
            valid_T=None if batch.valid_T is None else batch.valid_T[own_T],
            token_ids_T=batch.tokens_T[own_T],
            spread=self._spread,
            whole=self.route,
        )
        self.tokens_T = batch.tokens_T[own_T]
        self.logit_rows = _own_rows(batch.logit_rows_R, own_T)

    def decisions(self) -> Mapping[int, Decision]:
        """As `PagedContext.decisions`; collective."""
        if not self.routings:
            return {}
        mine = [torch.where(routing.kept_TK, routing.ids_TK, -1 - routing.ids_TK) for routing in self.routings.values()]
        everyone = self._spread.gather(torch.stack(mine, 1)).unbind(1)
        return {layer: _decision(went_TK) for layer, went_TK in zip(self.routings, everyone, strict=True)}


def _decision(went_TK: Tensor) -> Decision:
    kept_TK = went_TK >= 0
    return Decision(ids_TK=torch.where(kept_TK, went_TK, -1 - went_TK), wanted_TK=kept_TK, kept_TK=kept_TK)


def _own_rows(rows_R: Tensor, own_T: Tensor) -> Tensor:
    first = int(own_T[0]) if len(own_T) else 0
    return rows_R[(rows_R >= first) & (rows_R < first + len(own_T))] - first


def rows_by_rank(plan: StepPlan, ranks: int) -> list[int]:
    """How many rows of logits each of the ranks has that divide a plan's tokens."""
    total, end, rows = sum(item.count for item in plan.scheduled), 0, [0] * ranks
    share = -(-total // ranks)
    for item in plan.scheduled:
        end += item.count
        if item.samples:
            rows[(end - 1) // share] += 1
    return rows
