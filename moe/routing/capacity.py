"""Capacity: how many assignments one expert takes from one group, and which are kept.

C = min(max(ceil(factor · T · k / E), min_capacity), T), in exact integers (GShard 2006.16668 §2.2, Switch 2101.03961
eq. 3 with k). Slots fill `token_major` (by token, then choice: causal for every k), `choice_major` (GShard Algorithm 1:
every first choice before any second; causal only for k = 1), by `probability` or at `random` (never causal).

T tokens, E experts, K choices, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from ...kernels.random import DROP_ORDER

Count = TypeVar("Count", int, Tensor)


def capacity(tokens: Count, top_k: int, num_experts: int, factor: float, min_capacity: int) -> Count:
    """Slots of one expert for a group of `tokens` (an int, or an int64 tensor of many groups).

    The factor is read as the decimal it is written as: in floats 1.1 · 100 / 2 gives 56, exactly it is 55.
    """
    exact = Fraction(str(factor))
    slots = -(-exact.numerator * tokens * top_k // (exact.denominator * num_experts))
    if isinstance(tokens, Tensor):
        return torch.minimum(slots.clamp(min=min_capacity), tokens)
    return min(max(slots, min_capacity), tokens)


@dataclass(frozen=True)
class Room:
    """The slots of every expert in every group.

    Attributes:
        group_T: int64 group of each token, non-decreasing.
        slots_GE: int64, free slots.
    """

    group_T: Tensor
    slots_GE: Tensor

    @staticmethod
    def of(
        group_T: Tensor, tokens_G: Tensor, top_k: int, num_experts: int, factor: float, min_capacity: int,
        taken_GE: Tensor | None = None,
    ) -> "Room":  # fmt: skip
        """C slots for each expert in a group of `tokens_G` tokens, all free but those taken (None: none is)."""
        slots_GE = capacity(tokens_G, top_k, num_experts, factor, min_capacity)[:, None].expand(-1, num_experts)
        return Room(group_T, slots_GE if taken_GE is None else slots_GE - taken_GE)

    def queue(self, ids_TK: Tensor) -> Tensor:
        """Which queue (group · E + expert) each assignment stands in: int64 [T, K]."""
        return self.group_T[:, None] * self.slots_GE.shape[1] + ids_TK

    def without(self, ids_TK: Tensor, kept_TK: Tensor) -> "Room":
        """What is left when the kept assignments have taken their slots."""
        slots_N = self.slots_GE.flatten().scatter_add(0, self.queue(ids_TK).flatten(), -kept_TK.flatten().long())
        return Room(self.group_T, slots_N.view(self.slots_GE.shape))


def keep(
    ids_TK: Tensor,
    wanted_TK: Tensor,
    room: Room,
    *,
    order: str,
    gates_TE: Tensor,
    rank_TE: Tensor,
    reroute: int = 0,
    draw: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Which wanted assignments find a slot.

    Args:
        ids_TK: int64 expert ids, distinct for each token.
        wanted_TK: bool, assignments that ask for a slot.
        room: the slots.
        order: who comes first: `token_major`, `choice_major`, `probability` (highest gate first, then token_major) or
            `random` (by `draw`).
        gates_TE: gate of every expert (order `probability`).
        rank_TE: by which the next best expert is found; −inf = never (outside of the token's groups).
        reroute: rounds in which assignments that found no slot are retried, in the same order, at the token's next
            best expert that it has not asked yet (no-token-left-behind, Switch 2101.03961 appendix B). A retry takes
            what all first choices have left, so it looks at later tokens.
        draw: purpose → uniform numbers [T, K] (order `random`).

    Returns:
        ids_TK, changed where a retry found a slot and still distinct for each token, and kept_TK: wanted and within a
        slot.
    """
    kept_TK = fill(ids_TK, wanted_TK, room, _turns(order, ids_TK, gates_TE, draw))
    if not reroute:
        return ids_TK, kept_TK
    best_TE = rank_TE.sort(dim=-1, descending=True, stable=True).indices
    asked_TE = (rank_TE == -torch.inf).scatter(1, ids_TK, True)
    for _ in range(reroute):
        trial_TK, retry_TK = _next_best(ids_TK, wanted_TK & ~kept_TK, best_TE, asked_TE)
        left = room.without(ids_TK, kept_TK)
        found_TK = fill(trial_TK, retry_TK, left, _turns(order, trial_TK, gates_TE, draw))
        asked_TE = asked_TE.scatter(1, trial_TK, True)
        ids_TK, kept_TK = torch.where(found_TK, trial_TK, ids_TK), kept_TK | found_TK
    return ids_TK, kept_TK


def _turns(order: str, ids_TK: Tensor, gates_TE: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """The assignments, numbered by token and then choice, in the order in which they are served: int64 [T · K]."""
    if order == "probability":
        return gates_TE.gather(1, ids_TK).flatten().argsort(descending=True, stable=True)
    if order == "random":
        return draw(DROP_ORDER).flatten().argsort(stable=True)
    turn_TK = torch.arange(ids_TK.numel(), device=ids_TK.device).view(ids_TK.shape)
    return (turn_TK.T if order == "choice_major" else turn_TK).flatten()


def fill(ids_TK: Tensor, wanted_TK: Tensor, room: Room, turn_N: Tensor) -> Tensor:
    """bool [T, K]: the wanted assignments that find a slot when served in the order `turn_N`."""
    queue_TK = room.queue(ids_TK).masked_fill(~wanted_TK, -1)
    queue_N = queue_TK.flatten()[turn_N]
    kept_N = (queue_N >= 0) & (_place_in_queue(queue_N) < room.slots_GE.flatten()[queue_N.clamp(min=0)])
    return torch.empty_like(kept_N).scatter_(0, turn_N, kept_N).view(ids_TK.shape)


def _next_best(ids_TK: Tensor, dropped_TK: Tensor, best_TE: Tensor, asked_TE: Tensor) -> tuple[Tensor, Tensor]:
    """ids_TK with each dropped one replaced by its token's best expert not asked yet, and which ones there were.

    A token's first dropped assignment takes the best, its second the one after; none is left when all were asked.
    """
    fresh_TE = best_TE.gather(1, asked_TE.gather(1, best_TE).int().sort(dim=-1, stable=True).indices)
    nth_TK = dropped_TK.cumsum(1) - 1
    retry_TK = dropped_TK & (nth_TK < (~asked_TE).sum(1, keepdim=True))
    return torch.where(retry_TK, fresh_TE.gather(1, nth_TK.clamp(min=0)), ids_TK), retry_TK


def _place_in_queue(queue_N: Tensor) -> Tensor:
    """For each entry, how many earlier ones carry the same queue id: stable sort, then distance to the run's start."""
    sorted_N, order_N = queue_N.sort(stable=True)
    index_N = torch.arange(queue_N.numel(), device=queue_N.device)
    starts_N = torch.ones_like(sorted_N, dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    run_start_N = torch.where(starts_N, index_N, 0).cummax(0).values if queue_N.numel() else index_N
    return torch.empty_like(index_N).scatter_(0, order_N, index_N - run_start_N)
