"""Sorting assignments by expert on the device: count, scan, place. No host synchronisation, no atomics.

T tokens, K choices, P = T·K assignments, E experts, N rows = kept assignments.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreter

BLOCK = 64  # assignments a program counts and places
_FEWEST = 32  # bins a histogram must have, as many as a warp has threads


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert, then token, then choice.

    Args:
        order_P: int32, row → flat index t·K + k; rows past the last kept one have any value.
        slot_TK: int32, (t, k) → its row, or -1 where not kept.
        ends_E: int32, where each expert's rows end.
    """

    order_P: Tensor
    slot_TK: Tensor
    ends_E: Tensor


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    ids, kept, counts, assignments, blocks, experts, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts[e, block]: the kept assignments to expert e in a block."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < assignments
    if kept is not None:
        ok = ok & (tl.load(kept + at, mask=ok, other=0) != 0)
    expert = tl.load(ids + at, mask=ok, other=0).to(tl.int32)
    e = tl.arange(0, BINS)
    tl.store(counts + e * blocks + tl.program_id(0), tl.histogram(expert, BINS, mask=ok), mask=e < experts)


@triton.jit
def place_kernel(  # type: ignore[no-untyped-def]
    ids, kept, scanned, order, slots, assignments, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's number: those of lower experts, of earlier blocks, and of earlier assignments of this block."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < assignments
    ok = inside
    if kept is not None:
        ok = inside & (tl.load(kept + at, mask=inside, other=0) != 0)
    expert = tl.load(ids + at, mask=ok, other=0).to(tl.int32)
    owner = tl.where(ok, expert, -1)
    earlier = (owner[:, None] == owner[None, :]) & (at[None, :] < at[:, None])
    before = expert * blocks + tl.program_id(0)
    row = tl.load(scanned + before - 1, mask=ok & (before > 0), other=0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(slots + at, tl.where(ok, row, -1), mask=inside)
    tl.store(order + row, at, mask=ok)


def route(ids_TK: Tensor, kept_TK: Tensor | None, num_experts: int, dtype: torch.dtype = torch.int32) -> Routing:
    """Sort by expert; `dtype` is that of the order and the slots."""
    P, device = ids_TK.numel(), ids_TK.device
    order_P = torch.empty(P, dtype=dtype, device=device)
    slot_TK = torch.empty(ids_TK.shape, dtype=dtype, device=device)
    if P == 0:
        return Routing(order_P, slot_TK, torch.zeros(num_experts, dtype=torch.int32, device=device))
    ids = ids_TK.contiguous()
    kept = None if kept_TK is None else kept_TK.contiguous().view(torch.uint8)
    blocks = triton.cdiv(P, BLOCK)
    counts = torch.empty(num_experts, blocks, dtype=torch.int32, device=device)
    bins = max(_FEWEST, triton.next_power_of_2(num_experts))
    count_kernel[(blocks,)](ids, kept, counts, P, blocks, num_experts, bins, BLOCK)
    scanned = counts.flatten().cumsum(0, dtype=torch.int32)
    place_kernel[(blocks,)](ids, kept, scanned, order_P, slot_TK, P, blocks, BLOCK)
    return Routing(order_P, slot_TK, scanned.view(num_experts, blocks)[:, -1].contiguous())


def sort_by_expert_fits(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> bool:
    return ids_TK.is_cuda or interpreter.active()


def sort_by_expert_pays(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> bool:
    return ids_TK.is_cuda


def sort_by_expert(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The one synchronisation is to learn how many rows there are; `route` has none."""
    routing = route(ids_TK, kept_TK, num_experts, torch.int64)
    counts_E = routing.ends_E.diff(prepend=routing.ends_E.new_zeros(1)).long()
    return routing.order_P[: int(routing.ends_E[-1])], routing.slot_TK, counts_E
