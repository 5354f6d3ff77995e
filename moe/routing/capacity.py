"""Capacity: how many assignments one expert takes from one group, and which are kept.

C = min(max(ceil(factor · T · k / E), min_capacity), T), in exact integers (GShard 2006.16668 §2.2, Switch 2101.03961
eq. 3 with k). Slots fill `token_major` (by token, then choice: causal for every k) or `choice_major` (GShard
Algorithm 1: every first choice before any second; causal only for k = 1).

T tokens, E experts, K choices, G groups.
"""

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


def keep_within_capacity(
    ids_TK: Tensor, wanted_TK: Tensor, group_T: Tensor, capacity_G: Tensor, num_experts: int, drop_order: str
) -> Tensor:
    """Which wanted assignments find a slot.

    Args:
        ids_TK: int64 expert ids.
        wanted_TK: bool, assignments that ask for a slot.
        group_T: int64 group of each token, non-decreasing.
        capacity_G: int64 slots per expert in each group.
        num_experts: E.
        drop_order: `token_major` or `choice_major`: the order in which slots fill.

    Returns:
        kept_TK, bool: wanted and among the first C of its (group, expert) in that order.
    """
    tokens, top_k = ids_TK.shape
    if drop_order == "choice_major":
        ids_TK, wanted_TK = ids_TK.T, wanted_TK.T
        group_N = group_T.repeat(top_k)
    else:
        group_N = group_T.repeat_interleave(top_k)
    queue_N = (group_N * num_experts + ids_TK.reshape(-1)).masked_fill(~wanted_TK.reshape(-1), -1)
    kept_N = (queue_N >= 0) & (_place_in_queue(queue_N) < capacity_G[group_N])
    return kept_N.view(top_k, tokens).T if drop_order == "choice_major" else kept_N.view(tokens, top_k)


def _place_in_queue(queue_N: Tensor) -> Tensor:
    """For each entry, how many earlier ones carry the same queue id: stable sort, then distance to the run's start."""
    sorted_N, order_N = queue_N.sort(stable=True)
    index_N = torch.arange(queue_N.numel(), device=queue_N.device)
    starts_N = torch.ones_like(sorted_N, dtype=torch.bool)
    starts_N[1:] = sorted_N[1:] != sorted_N[:-1]
    run_start_N = torch.where(starts_N, index_N, 0).cummax(0).values if queue_N.numel() else index_N
    return torch.empty_like(index_N).scatter_(0, order_N, index_N - run_start_N)
