"""What the experts did during an evaluation: load, collapse, drops, under the names of `metrics.jsonl`.

A report per MoE layer, from sums that can be added over batches and ranks. E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..routing.record import Routing
from ..routing.stats import RoutingStats


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One MoE layer over an evaluation; every number is that of `RoutingSnapshot.fields` for this layer.

    Attributes:
        layer: the block's id.
        expert_load: share of assignments before drops, by expert; sums to 1 (all 0 when nothing was routed).
        load_max_mean: the busiest expert's load over the mean; 1 is perfect balance, E is one expert for all.
        load_cv: the load's standard deviation over its mean; 0 is perfect balance.
        router_entropy: mean over tokens of the router distribution's entropy, in nats; ln E is undecided.
        dead_experts: how many got no assignment: those whose load is 0.
        drop_fraction: dropped assignments / (tokens · k).
        router_logit_norm: mean over tokens of the Euclidean norm of the router's logits.
    """

    layer: int
    expert_load: tuple[float, ...]
    load_max_mean: float
    load_cv: float
    router_entropy: float
    dead_experts: int
    drop_fraction: float
    router_logit_norm: float


class ExpertTally:
    """Sums over the forward passes of one evaluation, on the CPU."""

    def __init__(self, layers: tuple[int, ...], num_experts: int) -> None:
        self.stats = RoutingStats(layers, num_experts, torch.device("cpu"))

    def add(self, routings: Mapping[int, Routing], valid_T: Tensor | None = None) -> None:
        """Count the routings of one forward pass, of the valid tokens held here (None: all are)."""
        self.stats.add(routings, valid_T)

    def report(self, reduce: Callable[[Tensor], Tensor]) -> tuple[ExpertReport, ...]:
        """The layers' reports over all ranks; `reduce` sums a tensor over them."""
        found = self.stats.fields(reduce(self.stats.tensor)) if self.stats.layers else {"moe_layers": []}
        return tuple(
            ExpertReport(
                layer=layer,
                expert_load=tuple(found["expert_load"][i]),
                load_max_mean=found["load_max_mean"][i],
                load_cv=found["load_cv"][i],
                router_entropy=found["router_entropy"][i],
                dead_experts=found["dead_experts"][i],
                drop_fraction=found["layer_drop_fraction"][i],
                router_logit_norm=found["router_logit_norm"][i],
            )
            for i, layer in enumerate(found["moe_layers"])
        )
