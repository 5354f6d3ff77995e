"""How fast a layout can be at best on named machines: FLOPs, bytes on the wire, seconds. Arithmetic, no torch.

    step      = (1 + (pp - 1) / (v m)) · slowest stage (busy + waits) + sums
    busy      = max(compute, memory)
    compute   = FLOPs of a rank, those of recomputation too / peak in train.dtype
    memory    = [m (3 b n + 2 (activations + logits)) + 2 weights + gradients + 2 optimizer] / memory bandwidth
    waits     = exchange + gathers and sums of tp and of cp + sends of pp + max(0, gathers of fsdp - busy) + 20 µs each
    sums      = divided and expert gradients + max(0, replicated gradients - 2/3 · busy / m), under pp and fsdp all
    sum       = 2 (P - 1) / P · bytes / ring                      over P ranks; a gather or a scatter is half of it
    ring      = link within a node, else min(link, network · ranks of the group in a node)
    exchange  = 4 rows D b · max((near - 1) / ep / link, (ep - near) / ep / network)      near: ranks in the node

over m micro-batches and n parameters of a rank, b bytes a number. Rows travel to their experts and back in train.dtype;
their gradients return the same ways. A layer that tp divides gathers A rows of D in train.dtype and
scatters as many, cp gathers keys and values and returns their gradients, a pipeline sends T rows of D in float32; with
`train.recompute=full` whatever a forward pass exchanges is exchanged once more. FSDP2 gathers every
parameter twice a micro-batch in train.dtype. These exchanges wait for nothing and everything waits for them; the sum of
the replicated gradients runs beside the last backward pass (2/3 of a micro-batch). A ring that leaves a node does so
through every port of its ranks there. Each exchange that is waited for costs 20 µs more. Load is even, nothing else
takes time: a run gets near this at best.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from ..configs.hardware import Accelerator, Network
from ..configs.typed import check
from ..moe.flops import flops_by_part, flops_per_token
from ..moe.train.config import RunConfig
from ..moe.train.footprint import Footprint, kinds
from ..moe.train.held import WIDE
from ..parallel.config import Layout

LATENCY = 20e-6  # seconds until the first byte of an exchange is there


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage; times are seconds of one optimizer step, bytes those that the rank sends in it."""

    held: Footprint
    accelerator: Accelerator
    network: Network

    @property
    def layout(self) -> Layout:
        """How ranks share the run."""
        return self.held.layout

    @cached_property
    def micro_batches(self) -> int:
        """m."""
        return self.held.config.micro_batches(self.layout.dp)

    @property
    def again(self) -> int:
        """How often a forward pass exchanges."""
        return 2 if self.held.config.train.recompute == "full" else 1

    # Bytes ------------------------------------------------------------------------------------------------------------

    @property
    def gradient_bytes(self) -> dict[str, float]:
        """By the dimension along which they are summed; FSDP2 scatters the sums and ZeRO gathers the weights anew."""
        held, layout = self.held.held, self.layout
        sizes = {"stage": layout.stage, "replicas": layout.dp * layout.cp, "edp": layout.edp}
        factor = 0.5 if held.config.parallel.fsdp else 1.0
        return {along: factor * _ring(ranks, WIDE * held.count(along)) for along, ranks in sizes.items()}

    @cached_property
    def exchange_bytes(self) -> float:
        """Dispatch and combine of all layers and micro-batches, forward; backward as much again."""
        moe, ep, held = self.held.config.model.moe, self.layout.ep, self.held
        if moe is None:
            return 0.0
        rows = self.micro_batches * held.sparse_layers * held.sent(moe)
        return 2 * rows * moe.width * held.width * (ep - 1) / ep

    @property
    def tensor_bytes(self) -> float:
        """Gathers before and sums after what tp divides: attention and dense feed-forward networks; forward."""
        held, tp = self.held, self.layout.tp
        divided = 2 * len(held.layers) - held.sparse_layers
        rows = 2 * self.micro_batches * divided * held.attended * (tp - 1) / tp
        return rows * held.config.model.width * held.width

    @property
    def context_bytes(self) -> float:
        """Keys and values gathered over cp, forward."""
        held, model, cp = self.held, self.held.config.model, self.layout.cp
        latent, heads = model.attention.latent, max(model.kv_heads // self.layout.tp, 1)
        numbers = 2 * model.head_dim + (latent.rope_dim + latent.value_dim - model.head_dim if latent else 0)
        each = heads * numbers * held.width
        return self.micro_batches * len(held.layers) * held.attended * (cp - 1) * each

    @property
    def pipeline_bytes(self) -> float:
        """Activations to the next stage and gradients to the one before, as a middle stage sends them."""
        parts = 2 * self.held.config.parallel.virtual if self.layout.pp > 1 else 0
        return parts * self.micro_batches * self.held.tokens * self.held.config.model.width * WIDE

    @property
    def gather_bytes(self) -> float:
        """FSDP2's gathers of weights, forward and backward."""
        held = self.held.held
        each = sum((1 - 1 / held.replicas(part)) * part.count for part in held.parts)
        return 2 * self.micro_batches * self.held.width * each if held.config.parallel.fsdp else 0.0

    # Seconds ----------------------------------------------------------------------------------------------------------

    @cached_property
    def compute_seconds(self) -> float:
        """Matrix products at the data sheet's peak."""
        config = self.held.config
        attention, feed, head = flops_by_part(config.model, config.train.seq_len, self.held.layers)
        anew = {"none": 0.0, "selective": feed / 3, "full": (attention + feed) / 3}[config.train.recompute]
        tokens = self.micro_batches * self.held.tokens
        return (attention + feed + head + anew) * tokens / self.accelerator.peak(config.train.dtype)

    @cached_property
    def memory_seconds(self) -> float:
        """Weights read in three passes, what is kept written and read, the optimizer's reads and writes."""
        held = self.held
        kept = held.blocks + (held.norm + held.head if held.logits else 0) + held.logits
        micro = 3 * held.width * held.held.numbers + 2 * kept
        step = 2 * held.weights + held.gradients + 2 * held.optimizer
        return (self.micro_batches * micro + step) / self.accelerator.bandwidth

    @property
    def busy_seconds(self) -> float:
        """Whatever is longer."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def exchange_seconds(self) -> float:
        """Rows to their experts and back, gradients the same ways; a node's own rows beside those for others."""
        ep, near = self.layout.ep, min(self.layout.ep, self.accelerator.node)
        if ep == 1:
            return 0.0
        peer = (1 + self.again) * self.exchange_bytes / (ep - 1)
        return max(peer * (near - 1) / self.accelerator.link, peer * (ep - near) / self.network.bandwidth)

    @property
    def tensor_seconds(self) -> float:
        """Of `tensor_bytes`, backward as much."""
        return (1 + self.again) * self.tensor_bytes / self._ring_bandwidth(self.layout.tp, 1)

    @property
    def context_seconds(self) -> float:
        """Of `context_bytes`, backward as much."""
        return (1 + self.again) * self.context_bytes / self._ring_bandwidth(self.layout.cp, self.layout.tp)

    @property
    def pipeline_seconds(self) -> float:
        """Of `pipeline_bytes`, to the same place in the next stage."""
        near = self.layout.world <= self.accelerator.node
        return self.pipeline_bytes / (self.accelerator.link if near else self.network.bandwidth)

    @property
    def gather_seconds(self) -> float:
        """What `gather_bytes` take beyond the computation beside them."""
        return max(0.0, self.gather_bytes / self._ring_bandwidth(self.layout.stage, 1) - self.busy_seconds)

    @property
    def rounds(self) -> int:
        """How often in a step all wait for an exchange: counts, rows there and back; gathers and sums; sends."""
        held, layout, parallel = self.held, self.layout, self.held.config.parallel
        layers, sparse = len(held.layers), held.sparse_layers
        forward = 3 * sparse * (layout.ep > 1) + 2 * (2 * layers - sparse) * (layout.tp > 1) + layers * (layout.cp > 1)
        backward = forward - sparse * (layout.ep > 1)
        others = 2 * parallel.virtual * (layout.pp > 1) + 2 * (layers + 1) * parallel.fsdp
        return self.micro_batches * (self.again * forward + backward + others)

    @cached_property
    def waits_seconds(self) -> float:
        """Exchanges within the micro-batches."""
        waits = self.exchange_seconds + self.tensor_seconds + self.context_seconds
        return waits + self.pipeline_seconds + self.gather_seconds + LATENCY * self.rounds

    @property
    def sum_seconds(self) -> float:
        """Sums of gradients that no backward pass hides."""
        layout, sizes = self.layout, self.gradient_bytes
        waits = sizes["replicas"] / self._ring_bandwidth(layout.dp * layout.cp, layout.tp)
        waits += sizes["edp"] / self._ring_bandwidth(layout.edp, layout.ep)
        hidden = self.busy_seconds / self.micro_batches * 2 / 3
        if layout.pp > 1 or self.held.config.parallel.fsdp:
            hidden = 0.0
        return waits + max(0.0, sizes["stage"] / self._ring_bandwidth(layout.stage, 1) - hidden)

    def _ring_bandwidth(self, size: int, stride: int) -> float:
        """Of `size` ranks, every `stride`-th of all."""
        machine = self.accelerator
        if size * stride <= machine.node:
            return machine.link
        return min(machine.link, self.network.bandwidth * max(machine.node // stride, 1))


@dataclass(frozen=True)
class Forecast:
    """One layout of a run on named machines."""

    config: RunConfig
    layout: Layout
    accelerator: Accelerator
    network: Network

    def __post_init__(self) -> None:
        rule = "makes two stacks of unlike rows, and forecasts are built for one"
        check(self.config.model.encoder is None, "model.encoder", "set", rule, "train it, and look at its first steps")

    @cached_property
    def stages(self) -> list[Stage]:
        """One for each kind of stage: of those that hold the same, the first, which keeps the most."""
        numbers = kinds(self.config.model, self.layout.pp, self.config.parallel.virtual)
        held = [Footprint(self.config, self.layout, self.accelerator.cpu, stage=number) for number in numbers]
        return [Stage(each, self.accelerator, self.network) for each in held]

    @cached_property
    def memory(self) -> Footprint:
        """Of the stage that holds the most, with even load."""
        return max((stage.held for stage in self.stages), key=lambda held: held.total)

    @cached_property
    def worst(self) -> Footprint:
        """Of the stage that holds the most with every token on this rank's experts."""
        collapsed = (replace(stage.held, collapsed=True) for stage in self.stages)
        return max(collapsed, key=lambda held: held.total)

    @cached_property
    def slowest(self) -> Stage:
        """The stage that all others wait for."""
        return max(self.stages, key=lambda stage: stage.busy_seconds + stage.waits_seconds)

    @property
    def fits(self) -> bool:
        """Whether a rank's memory holds the run while the load is even."""
        return self.memory.total <= self.accelerator.memory

    @property
    def flops(self) -> float:
        """Of one optimizer step on all ranks, without recomputation."""
        train = self.config.train
        return flops_per_token(self.config.model, train.seq_len) * train.global_batch * train.seq_len

    @property
    def bubble(self) -> float:
        """Idle time at the pipeline's ends, as a share of the slowest stage's time."""
        return (self.layout.pp - 1) / (self.config.parallel.virtual * self.slowest.micro_batches)

    @property
    def bubble_seconds(self) -> float:
        """Idle time at the pipeline's ends."""
        return self.bubble * (self.slowest.busy_seconds + self.slowest.waits_seconds)

    @cached_property
    def sum_seconds(self) -> float:
        """Sums of gradients that nothing hides."""
        return max(stage.sum_seconds for stage in self.stages)

    @property
    def exposed_seconds(self) -> float:
        """Communication that nothing hides."""
        return self.slowest.waits_seconds + self.sum_seconds

    @cached_property
    def seconds(self) -> float:
        """One optimizer step, at best."""
        return self.slowest.busy_seconds + self.bubble_seconds + self.exposed_seconds

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation, at most."""
        return self.flops / self.layout.world / self.accelerator.peak(self.config.train.dtype) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks, at most."""
        return self.config.train.global_batch * self.config.train.seq_len / self.seconds


def _ring(ranks: int, size: int) -> float:
    return 2 * (ranks - 1) / ranks * size
