"""Rows on their way between ranks: exchanges that run while something else is computed, forward and backward.

    journey = Journey(rows_ND, legs, traffic)      # the first all-to-all has begun
    ...                                            # compute something else
    journey.advance()                              # where there are two legs: the first has ended, the second begun
    rows_MD = journey.arrive()                     # wait for the rest

An exchange is a pair of autograd functions, `_Start` and `_Wait`. In the backward pass `_Wait` starts the exchange of
the gradient and `_Start` waits for it. Autograd runs nodes in the reverse of the order in which they were made, so what
was computed between the two in the forward pass is differentiated between them in the backward pass.

N rows sent, M rows that arrive, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ...kernels import permute
from ..process import naming
from .traffic import Traffic

Order = tuple[Tensor, Tensor]  # new row → old row, and old row → new row


@dataclass(frozen=True)
class Leg:
    """One all-to-all with uneven splits.

    Attributes:
        group: who takes part.
        sent, received: rows to and from each of them.
        before, after: how rows are put in order before they leave and when they have arrived; None = as they are.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    before: Order | None = None
    after: Order | None = None

    def back(self) -> "Leg":
        """The same way in the other direction."""
        return Leg(self.group, self.received, self.sent, _inverse(self.after), _inverse(self.before))


def way_back(legs: Sequence[Leg]) -> list[Leg]:
    """The legs of the way back."""
    return [leg.back() for leg in reversed(legs)]


class Journey:
    """Rows that have set out along `legs`. Collective over their groups; every rank calls the methods in one order."""

    def __init__(self, rows_ND: Tensor, legs: Sequence[Leg], traffic: Traffic) -> None:
        self._legs, self._traffic = list(legs), traffic
        self._depart(rows_ND)

    def advance(self) -> None:
        """End a leg, unless it is the last, and begin the next."""
        if len(self._legs) > 1:
            self._depart(self._land())

    def arrive(self) -> Tensor:
        """The rows, arrived."""
        while len(self._legs) > 1:
            self.advance()
        return self._land()

    def _depart(self, rows_ND: Tensor) -> None:
        leg = self._legs[0]
        self._flight = _Flight(self._traffic)
        self._arriving = _Start.apply(_ordered(rows_ND, leg.before), self._flight, leg)

    def _land(self) -> Tensor:
        leg = self._legs.pop(0)
        return _ordered(_Wait.apply(self._arriving, self._flight, leg), leg.after)


class _Flight:
    """An all-to-all under way: what `_Start` hands to `_Wait`, and in the backward pass `_Wait` to `_Start`."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def start(self, rows_ND: Tensor, leg: Leg, what: str) -> Tensor:
        """Begin; returns the buffer that fills."""
        self.leaving, self.what = rows_ND.contiguous(), f"all-to-all of {what}"
        self.arriving = rows_ND.new_empty(sum(leg.received), *rows_ND.shape[1:])
        with naming(self.what):
            self.work = dist.all_to_all_single(
                self.arriving, self.leaving, leg.received, leg.sent, group=leg.group, async_op=True
            )
        others = sum(leg.sent) - leg.sent[dist.get_rank(leg.group)]
        row = rows_ND.element_size() * rows_ND.shape[1:].numel()
        self.traffic.started(self.work, others * row, rows_ND.device)
        return self.arriving

    def land(self) -> Tensor:
        """Wait until the buffer is full; lets go of it and of what was sent."""
        with naming(self.what):
            self.traffic.wait(self.work, self.arriving.device)
        arrived = self.arriving
        del self.leaving, self.arriving, self.work
        return arrived


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, flight: _Flight, leg: Leg) -> Tensor:
        ctx.flight = flight
        return flight.start(rows_ND, leg, "expert rows")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flight.land(), None, None  # of the exchange that `_Wait` started, in place of `grad_MD`


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, arriving_MD: Tensor, flight: _Flight, leg: Leg) -> Tensor:
        ctx.flight, ctx.leg = flight, leg
        return flight.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        ctx.flight.start(grad_MD, ctx.leg.back(), "expert gradients")
        return grad_MD, None, None


def _ordered(rows: Tensor, order: Order | None) -> Tensor:
    if order is None:
        return rows
    new, old = order
    return permute(rows, new, old[:, None]) if rows.is_floating_point() else rows[new]


def _inverse(order: Order | None) -> Order | None:
    return None if order is None else (order[1], order[0])
