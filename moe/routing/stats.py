"""What the routers did, measured in one place: training, evaluation and serving show these numbers under these names.

Everything is a sum that adds up over forward passes, micro-batches and ranks; what people see follows from the sums.

L MoE layers, T tokens, E experts, K choices, N numbers a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ...kernels import tally_routes
from .record import Routing

# After a layer's E wanted assignments: dropped ones, valid tokens · K, summed entropy and logit norm, valid tokens.
REST = 5

TOGETHER = 2**20
"""Router probabilities that are looked at in one piece: many small layers cost what one does, large ones no copies."""


@dataclass(frozen=True, eq=False)
class RoutingSnapshot:
    """The sums as they stood at one moment; nothing changes them, so any thread may read them.

    Args:
        layers: ids of the MoE layers.
        sums_LN: float64 [L, E + REST].
    """

    layers: tuple[int, ...]
    sums_LN: Tensor

    def counts(self) -> list[list[int]]:
        """Wanted assignments, by layer and expert."""
        return self.sums_LN[:, :-REST].long().tolist()

    def dropped(self) -> list[int]:
        """Dropped assignments, by layer."""
        return self.sums_LN[:, -REST].long().tolist()

    def since(self, earlier: "RoutingSnapshot") -> "RoutingSnapshot":
        """What was added after an earlier snapshot of the same layers."""
        return RoutingSnapshot(self.layers, self.sums_LN - earlier.sums_LN)

    def fields(self) -> dict[str, Any]:
        """The routing fields of a row of `metrics.jsonl`; all 0 (and every expert dead) where nothing was routed.

        Returns:
            moe_layers: the layers' ids; what follows are lists by layer.
            expert_load: share of the wanted assignments, before drops, by expert; sums to 1.
            load_max_mean: the busiest expert's load over the mean: 1 is perfect balance, E is one expert for all.
            load_cv: the load's standard deviation over its mean (of the population): 0 is perfect balance.
            router_entropy: of the router's distribution, mean over tokens, in nats: ln E is undecided.
            dead_experts: how many got no assignment.
            layer_drop_fraction: dropped assignments / (valid tokens · k).
            router_logit_norm: Euclidean norm of a token's logits, mean over tokens.
            drop_fraction: mean of layer_drop_fraction, one number.
        """
        sums_LN = self.sums_LN.double().cpu()
        counts_LE = sums_LN[:, :-REST]
        dropped_L, slots_L, entropy_L, norm_L, tokens_L = sums_LN[:, -REST:].unbind(1)
        assigned_L = counts_LE.sum(1)
        load_LE = counts_LE / assigned_L.clamp(min=1)[:, None]
        relative_LE = load_LE * counts_LE.shape[1]
        drop_L = dropped_L / slots_L.clamp(min=1)
        return {
            "moe_layers": list(self.layers),
            "expert_load": load_LE.tolist(),
            "load_max_mean": relative_LE.amax(1).tolist() if self.layers else [],
            "load_cv": ((relative_LE - 1).square().mean(1).sqrt() * (assigned_L > 0)).tolist(),
            "router_entropy": (entropy_L / tokens_L.clamp(min=1)).tolist(),
            "dead_experts": (counts_LE == 0).sum(1).tolist(),
            "drop_fraction": float(drop_L.mean()) if self.layers else 0.0,
            "layer_drop_fraction": drop_L.tolist(),
            "router_logit_norm": (norm_L / tokens_L.clamp(min=1)).tolist(),
        }


class RoutingStats:
    """Sums over forward passes. One thread adds; nothing waits for the device before `fields`.

    Args:
        layers: ids of the MoE layers.
        num_experts: E.
        device: where the sums live.

    Attributes:
        tensor: float64 [L, E + REST]; may be summed over ranks, then read by `fields`.
    """

    def __init__(self, layers: tuple[int, ...], num_experts: int, device: torch.device) -> None:
        self.layers = layers
        self.tensor = torch.zeros(len(layers), num_experts + REST, dtype=torch.float64, device=device)

    def clear(self) -> None:
        """Begin anew."""
        self.tensor.zero_()

    @torch.no_grad()
    def add(self, routings: Mapping[int, Routing], valid_T: Tensor | None = None) -> None:
        """Add one forward pass.

        Args:
            routings: layer id → its routing, of every layer that this rank holds.
            valid_T: bool, False for padding, for which the routings want nothing; None = all valid.
        """
        held = [(row, routings[layer]) for row, layer in enumerate(self.layers) if layer in routings]
        for piece in _pieces(held):
            rows, found = zip(*piece, strict=True)
            whole = len(rows) == len(self.layers)
            sums_LN = self.tensor if whole else self.tensor.new_zeros(len(rows), self.tensor.shape[1])
            choices = [r.ids_TK if r.asked_TK is None else r.asked_TK for r in found]
            parts = ([r.logits_TE for r in found], choices, [r.wanted_TK for r in found], [r.kept_TK for r in found])
            tally_routes(sums_LN, *parts, valid_T=valid_T, shares=_shares(found), sigmoid=found[0].sigmoid)
            if not whole:
                for row, sums_N in zip(rows, sums_LN, strict=True):
                    self.tensor[row] += sums_N

    def fields(self, total_LN: Tensor | None = None) -> dict[str, Any]:
        """`RoutingSnapshot.fields` of these sums, or of their total over ranks."""
        return RoutingSnapshot(self.layers, self.tensor if total_LN is None else total_LN).fields()

    def snapshot(self) -> RoutingSnapshot:
        """The sums as they stand, for other threads."""
        return RoutingSnapshot(self.layers, self.tensor.clone())


def _pieces(held: Sequence[tuple[int, Routing]]) -> Iterator[Sequence[tuple[int, Routing]]]:
    """Neighbouring layers with equally many tokens, as many at once as are small enough."""
    for shape, layers in groupby(held, key=lambda pair: pair[1].logits_TE.shape):
        piece = list(layers)
        together = max(1, TOGETHER // max(shape.numel(), 1))
        yield from (piece[first : first + together] for first in range(0, len(piece), together))


def _shares(routings: Sequence[Routing]) -> list[Tensor] | None:
    """The routers' distributions; None where they follow from the logits alike."""
    if any(r.shares_TE is not None or r.sigmoid != routings[0].sigmoid for r in routings):
        return [r.probs_TE for r in routings]
    return None
