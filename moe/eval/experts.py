"""What the experts did during an evaluation: load, collapse, drops.

A report per MoE layer, from sums that can be added over batches and ranks. E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..routing.record import Routing


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One MoE layer over an evaluation.

    Attributes:
        layer: the block's id.
        load: share of assignments before drops, by expert; sums to 1 (all 0 when nothing was routed).
        max_over_mean: the busiest expert's load over the mean; 1 is perfect balance, E is collapse.
        dead: experts that got no assignment.
        router_entropy: mean over tokens of the router distribution's entropy, in nats; ln E is undecided.
        drop_fraction: assignments that were not kept (over capacity) / all assignments.
    """

    layer: int
    load: tuple[float, ...]
    max_over_mean: float
    dead: tuple[int, ...]
    router_entropy: float
    drop_fraction: float


class ExpertTally:
    """Sums over the forward passes of one evaluation: by layer [assignments to each expert, kept, entropy, tokens]."""

    def __init__(self, layers: tuple[int, ...], num_experts: int) -> None:
        self.sums = {layer: torch.zeros(num_experts + 3, dtype=torch.float64) for layer in layers}

    def add(self, routings: Mapping[int, Routing]) -> None:
        """Count the routings of one forward pass, whose tokens are all valid."""
        for layer, routing in routings.items():
            entropy = torch.special.entr(routing.probs_TE.double()).sum()
            rest = torch.stack([routing.kept_TK.sum(), entropy, entropy.new_tensor(len(routing.ids_TK))])
            self.sums[layer] += torch.cat([routing.counts_E, rest]).cpu()

    def report(self, reduce: Callable[[Tensor], Tensor]) -> tuple[ExpertReport, ...]:
        """The layers' reports over all ranks; `reduce` sums a tensor over them."""
        return tuple(_report(layer, reduce(sums)) for layer, sums in self.sums.items())


def _report(layer: int, sums: Tensor) -> ExpertReport:
    counts_E, (kept, entropy, tokens) = sums[:-3], sums[-3:].tolist()
    total = float(counts_E.sum())
    load_E = counts_E / max(total, 1)
    return ExpertReport(
        layer=layer,
        load=tuple(load_E.tolist()),
        max_over_mean=float(load_E.max()) * len(load_E),
        dead=tuple(torch.nonzero(counts_E == 0).flatten().tolist()),
        router_entropy=entropy / max(tokens, 1),
        drop_fraction=1 - kept / total if total else 0.0,
    )
