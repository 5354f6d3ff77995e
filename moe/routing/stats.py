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
            sums_LN = _sums(found, valid_T).to(self.tensor.device)
            if len(rows) == len(self.layers):
                self.tensor += sums_LN
            else:
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


def _sums(routings: Sequence[Routing], valid_T: Tensor | None) -> Tensor:
    """Some layers' numbers of one forward pass, float64 [L, N]."""
    tokens, top_k = routings[0].ids_TK.shape
    logits_LTE = torch.stack([routing.logits_TE for routing in routings])
    entropy_LT = torch.special.entr(_probs(routings, logits_LTE)).sum(2)
    norm_LT = torch.linalg.vector_norm(logits_LTE, dim=2)
    wanted_LTK, kept_LTK = (
        torch.stack(flags) for flags in zip(*((r.wanted_TK, r.kept_TK) for r in routings), strict=True)
    )
    dropped_L = (wanted_LTK & ~kept_LTK).sum((1, 2))
    if valid_T is None:
        tokens_L = dropped_L.new_full((len(routings),), tokens)
    else:
        entropy_LT, norm_LT = torch.where(valid_T, entropy_LT, 0), torch.where(valid_T, norm_LT, 0)
        tokens_L = valid_T.sum().expand(len(routings))
    choice_LTK = torch.stack([r.ids_TK if r.asked_TK is None else r.asked_TK for r in routings])
    counts_LE = wanted_LTK.new_zeros(len(routings), logits_LTE.shape[2], dtype=torch.int64)
    counts_LE.scatter_add_(1, choice_LTK.flatten(1), wanted_LTK.flatten(1).long())
    rest = (dropped_L, tokens_L * top_k, entropy_LT.double().sum(1), norm_LT.double().sum(1), tokens_L)
    return torch.cat([counts_LE.double(), torch.stack([number_L.double() for number_L in rest], 1)], 1)


def _probs(routings: Sequence[Routing], logits_LTE: Tensor) -> Tensor:
    """The routers' distributions, at once where they follow from the logits alike."""
    if any(routing.sigmoid or routing.shares_TE is not None for routing in routings):
        return torch.stack([routing.probs_TE for routing in routings])
    return logits_LTE.softmax(-1)
