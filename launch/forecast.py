"""How fast a layout can be at best on named machines: FLOPs, bytes on the wire, seconds. Arithmetic, no torch.

    step      = max(compute, memory) + exchange + expert sum + max(0, dense sum - 2/3 · max(compute, memory) / m)
    compute   = FLOPs of a rank / peak in train.dtype
    memory    = [m (3 b n + 2 (activations + logits)) + 2 weights + gradients + 2 optimizer] / memory bandwidth
    sum       = 2 (P - 1) / P · bytes / ring                      over P ranks
    ring      = link within a node, else min(link, network · ranks of the group in a node)
    exchange  = 4 rows D b · max((near - 1) / ep / link, (ep - near) / ep / network)      near: ranks in the node

over m micro-batches and n parameters of a rank, b bytes a number. Rows travel to their experts and back in train.dtype;
their gradients return the same ways. The exchange and the sum of the expert gradients wait for nothing and
everything waits for them; the sum of the dense gradients runs beside the last backward pass (2/3 of a micro-batch). A
ring that leaves a node does so through every port of its ranks there. Load is even, nothing else takes time: a run gets
near this at best.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from .. import ConfigError
from ..configs.hardware import Accelerator, Network
from ..moe import shapes
from ..moe.flops import flops_per_token
from ..moe.train.config import RunConfig
from ..moe.train.footprint import WIDE, Footprint
from ..parallel.config import Layout

WORLDS = tuple(2**i for i in range(13))


@dataclass(frozen=True)
class Forecast:
    """One layout of a run on named machines; times are seconds of one optimizer step, bytes those that a rank sends."""

    config: RunConfig
    layout: Layout
    accelerator: Accelerator
    network: Network

    @cached_property
    def memory(self) -> Footprint:
        """With even load."""
        return Footprint(self.config, self.layout, self.accelerator.cpu)

    @cached_property
    def worst(self) -> Footprint:
        """With every token on this rank's experts."""
        return replace(self.memory, collapsed=True)

    @property
    def fits(self) -> bool:
        """Whether a rank's memory holds the run while the load is even."""
        return self.memory.total <= self.accelerator.memory

    @property
    def micro_batches(self) -> int:
        """m."""
        return self.config.micro_batches(self.layout.dp)

    @property
    def flops(self) -> float:
        """Of one optimizer step on all ranks."""
        train = self.config.train
        return flops_per_token(self.config.model, train.seq_len) * train.global_batch * train.seq_len

    @property
    def dense_bytes(self) -> float:
        """Sum of the gradients that every rank has."""
        dense = {name: shape for name, shape in self.memory.shapes.items() if not shapes.is_expert(name)}
        return _ring(self.layout.dp, WIDE * shapes.count(dense))

    @property
    def expert_bytes(self) -> float:
        """Sum of the gradients of this rank's experts over their replicas."""
        experts = {name: shape for name, shape in self.memory.shapes.items() if shapes.is_expert(name)}
        return _ring(self.layout.edp, WIDE * shapes.count(experts))

    @property
    def exchange_bytes(self) -> float:
        """Dispatch and combine of all layers and micro-batches, forward; backward as much again."""
        moe, ep = self.config.model.moe, self.layout.ep
        if moe is None:
            return 0.0
        rows = self.micro_batches * len(self.config.model.moe_layers) * self.memory.sent(moe)
        return 2 * rows * moe.width * self.memory.width * (ep - 1) / ep

    @property
    def compute_seconds(self) -> float:
        """Matrix products at the data sheet's peak."""
        return self.flops / self.layout.dp / self.accelerator.peak(self.config.train.dtype)

    @property
    def memory_seconds(self) -> float:
        """Weights read in three passes, what is kept written and read, the optimizer's reads and writes."""
        held = self.memory
        micro = 3 * held.width * shapes.count(held.shapes) + 2 * (held.activations + held.logits)
        step = 2 * held.weights + held.gradients + 2 * held.optimizer
        return (self.micro_batches * micro + step) / self.accelerator.bandwidth

    @property
    def exposed_seconds(self) -> float:
        """Communication that nothing hides."""
        layout, busy = self.layout, max(self.compute_seconds, self.memory_seconds) / self.micro_batches
        dense = self.dense_bytes / self._ring_bandwidth(layout.dp, 1)
        experts = self.expert_bytes / self._ring_bandwidth(layout.edp, layout.ep)
        return self.exchange_seconds + experts + max(0.0, dense - busy * 2 / 3)

    @property
    def exchange_seconds(self) -> float:
        """Rows to their experts and back, gradients the same ways; a node's own rows beside those for others."""
        ep, near = self.layout.ep, min(self.layout.ep, self.accelerator.node)
        if ep == 1:
            return 0.0
        peer = 2 * self.exchange_bytes / (ep - 1)
        return max(peer * (near - 1) / self.accelerator.link, peer * (ep - near) / self.network.bandwidth)

    @property
    def seconds(self) -> float:
        """One optimizer step, at best."""
        return max(self.compute_seconds, self.memory_seconds) + self.exposed_seconds

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation, at most."""
        return self.compute_seconds / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks, at most."""
        return self.config.train.global_batch * self.config.train.seq_len / self.seconds

    def _ring_bandwidth(self, size: int, stride: int) -> float:
        """Of `size` ranks, every `stride`-th of all."""
        machine = self.accelerator
        if size * stride <= machine.node:
            return machine.link
        return min(machine.link, self.network.bandwidth * max(machine.node // stride, 1))


def layouts(config: RunConfig, world: int, accelerator: Accelerator, network: Network) -> Iterator[Forecast]:
    """Every ep that fits, for `world` ranks and every power of two up to thousands over which the batch divides."""
    experts = config.model.moe.num_experts if config.model.moe else 1
    for ranks in sorted({*WORLDS, world}):
        for ep in (e for e in range(1, experts + 1) if experts % e == 0 and ranks % e == 0):
            other = replace(config, parallel=replace(config.parallel, dp=None, ep=ep))
            try:
                layout = other.layout(ranks)
            except ConfigError:  # the batch does not divide
                continue
            yield Forecast(other, layout, accelerator, network)


def _ring(ranks: int, size: int) -> float:
    return 2 * (ranks - 1) / ranks * size
