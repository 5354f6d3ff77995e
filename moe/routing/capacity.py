"""Capacity: how many assignments one expert takes from one group, and which are kept.

C = min(max(ceil(factor · T · k / E), min_capacity), T), in exact integers (GShard 2006.16668 §2.2, Switch 2101.03961
eq. 3 with k). Slots fill `token_major` (by token, then choice: causal for every k) or `choice_major` (GShard
Algorithm 1: every first choice before any second; causal only for k = 1).

T tokens, E experts, K choices, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

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
    def of(group_T: Tensor, tokens_G: Tensor, top_k: int, num_experts: int, factor: float, min_capacity: int) -> "Room":
        """All slots free, C of them for each expert in a group of `tokens_G` tokens."""
        slots_G = capacity(tokens_G, top_k, num_experts, factor, min_capacity)
        return Room(group_T, slots_G[:, None].expand(-1, num_experts))


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
        ids_TK: int64 expert ids.
        wanted_TK: bool, assignments that ask for a slot.
        room: the slots.
        order: who comes first: `token_major`, `choice_major`, `probability` (highest gate first, then token_major) or
            `random` (by `draw`).
        gates_TE: gate of every expert (order `probability`).
        rank_TE: by which the next best expert is found.
        reroute: rounds in which assignments that found no slot are retried at the token's next best expert that it
            has not asked yet (no-token-left-behind, Switch 2101.03961 appendix B).
        draw: purpose → uniform numbers [T, K] (order `random`).

    Returns:
        ids_TK, changed where an assignment was rerouted, and kept_TK: wanted and within a slot.
    """
    tokens, top_k = ids_TK.shape
    if order == "choice_major":
        ids, wanted, group_N = ids_TK.T, wanted_TK.T, room.group_T.repeat(top_k)
    else:
        ids, wanted, group_N = ids_TK, wanted_TK, room.group_T.repeat_interleave(top_k)
    queue_N = (group_N * gates_TE.shape[1] + ids.reshape(-1)).masked_fill(~wanted.reshape(-1), -1)
    kept_N = (queue_N >= 0) & (_place_in_queue(queue_N) < room.slots_GE.reshape(-1)[queue_N.clamp(min=0)])
    return ids_TK, kept_N.view(top_k, tokens).T if order == "choice_major" else kept_N.view(tokens, top_k)


def _place_in_queue(queue_N: Tensor) -> Tensor:
    """For each entry, how many earlier ones carry the same queue id: stable sort, then distance to the run's start."""
    sorted_N, order_N = queue_N.sort(stable=True)
    index_N = torch.arange(queue_N.numel(), device=queue_N.device)
    starts_N = torch.ones_like(sorted_N, dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    run_start_N = torch.where(starts_N, index_N, 0).cummax(0).values if queue_N.numel() else index_N
    return torch.empty_like(index_N).scatter_(0, order_N, index_N - run_start_N)
