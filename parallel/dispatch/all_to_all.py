"""Experts spread over ranks: rows travel to the rank of their expert and back (GShard 2006.16668 §3.3).

    prepare     sort this rank's assignments by global expert; tell every rank how many rows each expert gets
    exchange    one all-to-all with uneven splits
    arrange     what arrived is sorted by (source rank, expert); the experts want (expert, source rank)

Experts lie on the ranks in blocks: rank r of P holds [r * E / P, (r + 1) * E / P), so rows sorted by expert are
already sorted by destination. The sizes travel once; the way back and both backward passes reuse them. A rank that
sends or receives nothing takes part all the same.

T tokens, D width, E experts of the layer, L experts held here, P ranks, K choices, N kept assignments sent, M received.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels import combine, permute, sort_by_expert
from ..process import naming
from .local import Dispatched, ends


@dataclass(frozen=True)
class Sizes:
    """How many rows go to and come from each rank."""

    sent: list[int]
    received: list[int]

    def back(self) -> "Sizes":
        return Sizes(self.received, self.sent)


@dataclass(frozen=True)
class Exchanged(Dispatched):
    """`Dispatched`, and the way back.

    Attributes:
        sizes: the exchange this went through.
        arrange_M: sorted row → row as received.
        arrived_M: row as received → sorted row.
    """

    sizes: Sizes
    arrange_M: Tensor
    arrived_M: Tensor


class AllToAllDispatcher:
    """The dispatcher of a layer whose experts are spread over `group`; every method is collective over it.

    Args:
        group: the expert-parallel ranks, in the order in which they hold the experts.
        num_experts: E, of the whole layer.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> Exchanged:
        """As `LocalDispatcher.dispatch`; the rows are those of all ranks for the experts held here."""
        assert num_experts == self.num_experts, "the layer and its dispatcher disagree on the number of experts"
        order_N, slot_TK, sizes, arriving_PL = self.prepare(ids_TK, kept_TK)
        rows_MD = self.exchange(permute(x_TD, order_N, slot_TK), sizes)
        arrange_M, arrived_M = self.arrange(arriving_PL)
        rows_MD = permute(rows_MD, arrange_M, arrived_M[:, None])
        return Exchanged(rows_MD, ends(arriving_PL.sum(0)), order_N, slot_TK, sizes, arrange_M, arrived_M)

    def combine(self, y_MD: Tensor, weights_TK: Tensor, sent: Exchanged) -> Tensor:
        """As `LocalDispatcher.combine`, after the outputs have travelled back."""
        y_MD = permute(y_MD, sent.arrived_M, sent.arrange_M[:, None])
        return combine(self.exchange(y_MD, sent.sizes.back()), weights_TK, sent.order_N, sent.slot_TK)

    def carry(self, values_TK: Tensor, sent: Exchanged) -> Tensor:
        """As `LocalDispatcher.carry`, along the way that the rows went."""
        values_N = values_TK.flatten()[sent.order_N]
        return _exchange(values_N, sent.sizes, self.group, "all-to-all of row keys")[sent.arrange_M]

    def prepare(self, ids_TK: Tensor, kept_TK: Tensor) -> tuple[Tensor, Tensor, Sizes, Tensor]:
        """Sort by global expert and exchange the sizes: (order_N, slot_TK, sizes, rows arriving by rank and expert)."""
        order_N, slot_TK, counts_E = sort_by_expert(ids_TK, kept_TK, self.num_experts)
        leaving_PL = counts_E.view(self.group.size(), -1)
        arriving_PL = torch.empty_like(leaving_PL)
        with naming("all-to-all of expert counts"):
            dist.all_to_all_single(arriving_PL, leaving_PL, group=self.group)
        sent, received = torch.stack([leaving_PL.sum(1), arriving_PL.sum(1)]).tolist()
        return order_N, slot_TK, Sizes(sent, received), arriving_PL

    def exchange(self, rows_ND: Tensor, sizes: Sizes) -> Tensor:
        """Send `sizes.sent[r]` rows to each rank r, in order; returns what arrives, by source rank. Differentiable."""
        return _AllToAll.apply(rows_ND, sizes, self.group)

    def arrange(self, arriving_PL: Tensor) -> tuple[Tensor, Tensor]:
        """The permutation from (source rank, expert) to (expert, source rank) order, and its inverse."""
        ranks, local = arriving_PL.shape
        expert_PL = torch.arange(local, device=arriving_PL.device).repeat(ranks)
        expert_M = expert_PL.repeat_interleave(arriving_PL.reshape(-1))
        arrange_M = expert_M.argsort(stable=True)
        arrived_M = torch.empty_like(arrange_M)
        arrived_M[arrange_M] = torch.arange(arrange_M.numel(), device=arrange_M.device)
        return arrange_M, arrived_M


class _AllToAll(torch.autograd.Function):
    """all_to_all_single with uneven splits; its gradient is the same exchange backwards (no scaling)."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, sizes: Sizes, group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _exchange(rows_ND, sizes, group, "all-to-all of expert rows")

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grad_MD, ctx.sizes.back(), ctx.group, "all-to-all of expert gradients"), None, None


def _exchange(rows_ND: Tensor, sizes: Sizes, group: dist.ProcessGroup, operation: str) -> Tensor:
    arriving = rows_ND.new_empty(sum(sizes.received), *rows_ND.shape[1:])
    with naming(operation):
        dist.all_to_all_single(arriving, rows_ND.contiguous(), sizes.received, sizes.sent, group=group)
    return arriving
