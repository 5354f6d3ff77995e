"""The runners of several ranks: rank 0 says what each replica computes, and gets the logits of all.

Every step, every rank computes the same layers on its own part of it, if need be on no token: so all of them take part
in the same exchanges.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ... import PeerError
from ...kernels.registry import using
from ...moe.models.decoder import Decoder
from ...moe.routing.stats import RoutingSnapshot
from ...parallel import process
from ...parallel.dispatch.all_to_all import traffic_of
from ...parallel.serving import Link
from ..core.replicas import JointPlan
from ..core.step import StepPlan
from .batch import Batch
from .context import PagedContext
from .divided import DividedContext, padded, rows_by_rank
from .executor import Executor, StepResult
from .runner import ModelRunner
from .wire import pack, unpack

SUM_SECONDS = 0.5  # how old the routers' statistics of all ranks may be while requests run
LOOK = 0.1  # seconds between two looks whether a rank is lost, while a step runs


class Order(IntEnum):
    """What rank 0 orders."""

    END = 0
    STEP = 1
    STEP_AND_SUM = 2
    """A step, and then the sum of the routers' statistics."""
    SUM = 3


class PartRunner(ModelRunner):
    """A rank that computes what rank 0 orders.

    Args:
        link: to rank 0.
        model: this rank's part.
        settings: further arguments of `ModelRunner`.
    """

    def __init__(self, link: Link, model: Decoder, *settings: Any) -> None:
        super().__init__(model, *settings)
        self.records = False  # an exchange is no kernel, and all ranks must take part
        self.link = link
        self._tp = link.mesh.size("tp")
        self._traffic, self._sent, self._uncounted = traffic_of(model), 0, 0

    def follow(self) -> None:
        """Do what rank 0 orders, until it says that this is the end. Every error is for its caller to end by."""
        while True:
            kind, tensors = self.link.receive(self.link.mesh.dp_rank)
            if kind == Order.END:
                return
            if kind != Order.SUM:
                with using(self.form):
                    _, logits_RV = self.forward(unpack(tensors))
                self.link.collect(logits_RV, ())
            if kind != Order.STEP:
                self._sum()

    def _fill(self, batch: Batch) -> Batch:
        return padded(batch, self._tp)

    def _surround(self, batch: Batch, memory_SD: Tensor | None, taken: Mapping[int, Tensor] | None) -> PagedContext:
        if self._tp == 1:
            return super()._surround(batch, memory_SD, taken)
        return DividedContext(batch, self.cache, self.link.mesh, taken)

    def _sum(self) -> RoutingSnapshot:
        """What the routers did on all ranks, and what these have sent: the last number of what is summed."""
        if self._traffic is not None:
            self._sent += self._traffic.bytes
            self._traffic.clear()  # its list of times would grow for ever
        sums_LN = self.routing.tensor
        own = torch.cat([sums_LN.flatten(), sums_LN.new_tensor([self._sent])])
        total = process.all_sum(own, "sum of the routers' statistics")
        self.sent_bytes = int(total[-1]) - self._uncounted
        return RoutingSnapshot(self.routing.layers, total[:-1].view_as(sums_LN))


class LeadRunner(PartRunner):
    """Rank 0: tells the others, computes its own part, and samples for all replicas."""

    def __init__(self, link: Link, model: Decoder, *settings: Any) -> None:
        super().__init__(link, model, *settings)
        self._before = self._totals = self.routing.snapshot()
        """What is not counted, and what is."""
        self._summed, self._stale = time.monotonic(), False

    def forward(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """As `ModelRunner.forward`, with the logits of all replicas, one after another.

        Raises:
            PeerError: whatever went wrong, for now the others wait in an exchange that does not come.
        """
        try:
            return self._forward(plan.parts if isinstance(plan, JointPlan) else (plan,))
        except PeerError:
            raise
        except Exception as error:
            rule = "failed in a step that all ranks compute together"
            raise PeerError(f"rank 0 {rule} ({type(error).__name__}: {error}): start again") from error

    def _forward(self, parts: Sequence[StepPlan]) -> tuple[Batch, Tensor]:
        sums = time.monotonic() - self._summed > SUM_SECONDS
        self.link.order(Order.STEP_AND_SUM if sums else Order.STEP, [pack(part, self._newest) for part in parts])
        batch, logits_RV = super().forward(parts[0])
        counts = [rows for part in parts for rows in rows_by_rank(part, self._tp)]
        logits_RV = self.link.collect(logits_RV, counts)
        self._stale = True
        if sums:
            self._sum()
        sampling = tuple(item for part in parts for item in part.scheduled if item.samples)
        return replace(batch, sampling=sampling), logits_RV

    def totals(self, *, idle: bool) -> RoutingSnapshot:
        """Of all ranks: exact when the engine is idle, else at most `SUM_SECONDS` and a step old."""
        if idle and self._stale:
            self.link.order(Order.SUM)
            self._sum()
        return self._totals

    def forget(self) -> None:
        """As `ModelRunner.forget`; the others go on with their sums."""
        self.link.order(Order.SUM)
        self._before = super()._sum()
        self._totals, self._stale = self._before.since(self._before), False
        self._uncounted, self.sent_bytes = self.sent_bytes, 0

    def end(self) -> None:
        """Let the others go."""
        self.link.order(Order.END)

    def _sum(self) -> RoutingSnapshot:
        self._totals, self._summed, self._stale = super()._sum().since(self._before), time.monotonic(), False
        return self._totals


class WatchedExecutor(Executor):
    """Steps run in a thread of their own, and nobody waits there for a rank that is lost.

    Args:
        loss: the error once a rank is lost.
    """

    def __init__(
        self, compute: Callable[[StepPlan], StepResult], loss: Callable[[], PeerError | None], *, overlap: bool
    ) -> None:
        super().__init__(compute, overlap=True)
        self._loss, self._ahead = loss, overlap

    @property
    def overlaps(self) -> bool:
        return self._ahead

    def collect(self) -> StepResult:
        """As `Executor.collect`.

        Raises:
            PeerError: a rank is lost.
        """
        step = self._launched.popleft()
        assert isinstance(step, Future)
        while not wait_for([step], LOOK).done:
            if (error := self._loss()) is not None:
                raise error
        return step.result()

    def discard(self) -> None:
        """As `Executor.discard`; a step that stands in an exchange with a lost rank is left there."""
        if self._loss() is None:
            super().discard()
        self._launched.clear()

    def close(self) -> None:
        """As `Executor.close`."""
        if self._loss() is None:
            super().close()
