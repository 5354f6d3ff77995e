"""The sum of a large tensor's squares: parts of one length, added up in float64 in one order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .probe import runs

COLUMNS = 1024
PART = 64 * COLUMNS  # numbers of a program


@triton.jit
def square_sum_kernel(x, parts, N, COLUMNS: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * PART
    lanes = tl.zeros([COLUMNS], tl.float64)
    for done in range(0, PART, COLUMNS):
        at = start + done + tl.arange(0, COLUMNS)
        value = tl.load(x + at, mask=at < N, other=0.0).to(tl.float64)
        lanes += value * value
    tl.store(parts + tl.program_id(0), tl.sum(lanes, 0))


def square_sum_fits(x: Tensor) -> bool:
    return runs(x) and x.is_contiguous()


def square_sum_pays(x: Tensor) -> bool:
    return x.is_cuda


def square_sum(x: Tensor) -> Tensor:
    parts = torch.empty(triton.cdiv(x.numel(), PART), dtype=torch.float64, device=x.device)
    if len(parts):
        square_sum_kernel[(len(parts),)](x, parts, x.numel(), COLUMNS, PART)
    return parts.sum()
