"""Says when a router collapses: a layer whose tokens all go to the same few experts trains no other.

alarm = CollapseAlarm(threshold=0.1, patience=3, top_k=2)
for event in alarm.check(row): ...           # row: a training row of metrics.jsonl
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """One layer's collapse.

    Attributes:
        step: of the row that completed it.
        layer: the block's id.
        evenness: of that row, 0 to 1.
        expert_load: the layer's share of assignments, by expert.
    """

    step: int
    layer: int
    evenness: float
    expert_load: tuple[float, ...]

    @property
    def text(self) -> str:
        """What happened and what to do."""
        share = max(self.expert_load)
        return (
            f"layer {self.layer} has collapsed: expert {self.expert_load.index(share)} of {len(self.expert_load)} takes"
            f" {share:.1%} of the assignments (evenness {self.evenness:.2f}): raise moe.balance_loss or moe.z_loss"
            f" (deepseek_v3: moe.bias_rate), or lower optim.lr, and start again from an earlier checkpoint"
        )


class CollapseAlarm:
    """Fires once when a layer's evenness stays below a threshold, and again only after it has recovered.

    Args:
        threshold: evenness below which a row counts; None = never.
        patience: rows in a row that it takes.
        top_k: experts a token.
    """

    def __init__(self, threshold: float | None, patience: int, top_k: int) -> None:
        self.threshold, self.patience, self.top_k = threshold, patience, top_k
        self.below: dict[int, int] = {}
        """Layer → rows in a row that were below."""

    def check(self, row: Mapping[str, Any]) -> list[Event]:
        """The layers whose collapse this training row completes."""
        events = []
        for layer, load in zip(row["moe_layers"], row["expert_load"], strict=True):
            even = evenness(load, self.top_k)
            collapsing = even is not None and self.threshold is not None and even < self.threshold
            self.below[layer] = self.below.get(layer, 0) + 1 if collapsing else 0
            if even is not None and self.below[layer] == self.patience:
                events.append(Event(step=row["step"], layer=layer, evenness=even, expert_load=tuple(load)))
        return events


def evenness(load: Sequence[float], top_k: int) -> float | None:
    """(exp(entropy of the load) − k) / (E − k): 0 when k experts take everything, 1 when all take the same.

    None where it has no meaning: k = E, or nothing was routed.
    """
    if top_k >= len(load) or not any(load):
        return None
    in_use = math.exp(-sum(share * math.log(share) for share in load if share))
    return max(in_use - top_k, 0.0) / (len(load) - top_k)
