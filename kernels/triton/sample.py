"""Drawing a row's next token without sorting: a search for the least probability that is kept, digit by digit.

Probabilities are the library's, whose bits the reference has; as whole numbers they are in the same order. A program
finds in its row the k-th highest, then the one at which the mass of those above reaches p, three bits in each pass over
the row. How many of several equal ones are kept is counted, so that ties are exact. Masses are float64.

R rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import SAMPLE_WARPS, row_columns, sample_columns
from ..random import SAMPLE
from ..reference.sampling import GREEDY, probabilities
from .probe import runs

TINY = 1e-300


@triton.jit
def _best(row, V, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest place of the highest number; NaN is none."""
    at = tl.arange(0, COLUMNS)
    top, place = tl.full([COLUMNS], -float("inf"), tl.float32), at
    for start in range(0, V, COLUMNS):
        x = tl.load(row + start + at, mask=at < V - start, other=-float("inf"))
        better = x > top
        top, place = tl.where(better, x, top), tl.where(better, start + at, place)
    return tl.min(tl.where(top == tl.max(top, 0), place, V - 1), 0)


@triton.jit
def _numbers(row, start, V, floor, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some probabilities, 0 below `floor`, and their bits, which are in the same order; -1 beyond the row."""
    at = start + tl.arange(0, COLUMNS)
    p = tl.load(row + at, mask=at < V, other=0.0)
    p = tl.where(p < floor, 0.0, p)
    return p, tl.where(at < V, p.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(row, V, floor, pivots, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many numbers have at least each pivot's bits."""
    lanes = tl.zeros([COLUMNS, pivots.shape[0]], tl.int32)
    for start in range(0, V, COLUMNS):
        _, bits = _numbers(row, start, V, floor, COLUMNS)
        lanes += (bits[:, None] >= pivots[None, :]).to(tl.int32)
    return tl.sum(lanes, 0)


@triton.jit
def _mass(row, V, floor, pivots, least, ties, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mass of the numbers that have at least each pivot's bits, of those above `least` and `ties` of its equals."""
    lanes = tl.zeros([COLUMNS, pivots.shape[0]], tl.float64)
    for start in range(0, V, COLUMNS):
        p, bits = _numbers(row, start, V, floor, COLUMNS)
        seen = (bits[:, None] >= pivots[None, :]) & (bits > least)[:, None]
        lanes += tl.where(seen, p.to(tl.float64)[:, None], 0.0)
    tied = tl.where(ties > 0, ties.to(tl.float64) * _value(least), 0.0)
    return tl.sum(lanes, 0) + tl.where(pivots <= least, tied, 0.0)


@triton.jit
def _value(bits):
    return tl.maximum(bits, 0).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _first(values):
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == 0, values, 0), 0)


@triton.jit
def _top_k(row, V, floor, k, COLUMNS: tl.constexpr, PIVOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(The k-th highest number's bits, how many of its equals are among the k.)"""
    d = tl.arange(0, PIVOTS)
    least = k * 0
    for step in range(0, 10):
        shift = 27 - 3 * step
        enough = _count(row, V, floor, least + (d << shift), COLUMNS) >= k
        least += (tl.maximum(tl.sum(enough.to(tl.int32), 0), 1) - 1) << shift
    return least, k - _first(_count(row, V, floor, least + 1 + d, COLUMNS))


@triton.jit
def _top_p(row, V, floor, least, ties, p, COLUMNS: tl.constexpr, PIVOTS: tl.constexpr, TINY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for the fewest numbers whose mass reaches p of that of the numbers above `least` and its `ties`."""
    d = tl.arange(0, PIVOTS)
    border = least * 0
    wanted = tl.maximum(p * _first(_mass(row, V, floor, border + d, least, ties, COLUMNS)), TINY)
    for step in range(0, 10):
        shift = 27 - 3 * step
        enough = _mass(row, V, floor, border + (d << shift), least, ties, COLUMNS) >= wanted
        border += (tl.maximum(tl.sum(enough.to(tl.int32), 0), 1) - 1) << shift
    above = _first(_mass(row, V, floor, border + 1 + d, least, ties, COLUMNS))
    value = _value(border)
    count = tl.maximum((wanted - above) / tl.maximum(value, TINY), 0.0)
    few = tl.maximum(tl.minimum(count, V).to(tl.int32) - 1, 1)
    for _ in range(0, 3):  # the quotient is rounded, what the reference compares is the sum
        few += (above + few.to(tl.float64) * value < wanted).to(tl.int32)
    return border, few


@triton.jit
def _kept(row, start, V, floor, least, ties, before, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some probabilities, 0 if they are not kept, and how many equals of the least there were up to here."""
    p, bits = _numbers(row, start, V, floor, COLUMNS)
    equal = (bits == least).to(tl.int32)
    kept = (bits > least) | (equal > 0) & (before + tl.cumsum(equal, 0) <= ties)
    return tl.where(kept, p.to(tl.float64), 0.0), before + tl.sum(equal, 0)


@triton.jit
def _draw(row, V, floor, least, ties, u, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first token at which the kept mass so far passes u times all of it; never one that is not kept."""
    at = tl.arange(0, COLUMNS)
    lanes, before = tl.zeros([COLUMNS], tl.float64), ties * 0
    for start in range(0, V, COLUMNS):
        p, before = _kept(row, start, V, floor, least, ties, before, COLUMNS)
        lanes += p
    passed = u.to(tl.float64) * tl.sum(lanes, 0)
    mass, before = tl.sum(tl.zeros([COLUMNS], tl.float64), 0), ties * 0
    found, last = ties * 0 + V, ties * 0
    for start in range(0, V, COLUMNS):
        p, before = _kept(row, start, V, floor, least, ties, before, COLUMNS)
        there = p > 0
        found = tl.minimum(found, tl.min(tl.where(there & (mass + tl.cumsum(p, 0) > passed), start + at, V), 0))
        last = tl.maximum(last, tl.max(tl.where(there, start + at, 0), 0))
        mass += tl.sum(p, 0)
    return tl.where(found < V, found, last)


@triton.jit
def _uniform(seed, index, step, PURPOSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first draw of `random.uniform` of layer 0."""
    word, _, _, _ = tl.philox(
        seed, (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32 & 0xFFFFFFFF).to(tl.uint32),
        (step & 0xFFFFFFFF).to(tl.uint32), (step * 0 + (PURPOSE << 8)).to(tl.uint32),
    )  # fmt: skip
    return (word >> 8).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def sample_kernel(  # type: ignore[no-untyped-def]
    scores, probs, temperature, top_k, top_p, min_p, seeds, choices, positions, ids, V, scores_row, probs_row,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, PIVOTS: tl.constexpr, GREEDY: tl.constexpr, TINY: tl.constexpr,
    PURPOSE: tl.constexpr,
):  # fmt: skip
    """One row's token. COLUMNS of a row at a time where they are compared with PIVOTS numbers, else WIDE."""
    r = tl.program_id(0).to(tl.int64)
    if tl.load(temperature + r) < GREEDY:
        tl.store(ids + r, _best(scores + r * scores_row, V, WIDE).to(tl.int64))
    else:
        row = probs + r * probs_row
        highest = tl.load(row + _best(row, V, WIDE))
        floor = tl.load(min_p + r).to(tl.float32) * highest
        k, p = tl.minimum(tl.load(top_k + r), V).to(tl.int32), tl.load(top_p + r)
        least, ties = k * 0 - 1, k * 0
        if (k > 0) & (k < V):
            least, ties = _top_k(row, V, floor, k, COLUMNS, PIVOTS)
        if p < 1:
            least, ties = _top_p(row, V, floor, least, ties, p, COLUMNS, PIVOTS, TINY)
        u = _uniform(tl.load(seeds + r), tl.load(positions + r), tl.load(choices + r), PURPOSE)
        tl.store(ids + r, _draw(row, V, floor, least, ties, u, WIDE).to(tl.int64))


PIVOTS = 8


def sample_rows_fits(
    scores_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, seeds_R: Tensor,
    choices_R: Tensor, positions_R: Tensor,
) -> bool:  # fmt: skip
    return runs(scores_RV) and scores_RV.dtype == torch.float32


def sample_rows_pays(
    scores_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, seeds_R: Tensor,
    choices_R: Tensor, positions_R: Tensor,
) -> bool:  # fmt: skip
    return scores_RV.is_cuda


def sample_rows(
    scores_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, seeds_R: Tensor,
    choices_R: Tensor, positions_R: Tensor,
) -> Tensor:  # fmt: skip
    (R, V), ids_R = scores_RV.shape, torch.empty(len(scores_RV), dtype=torch.int64, device=scores_RV.device)
    if R:
        scores_RV = scores_RV if scores_RV.stride(1) == 1 else scores_RV.contiguous()
        probs_RV = probabilities(scores_RV, torch.where(temperature_R < GREEDY, 1.0, temperature_R))
        wishes = (temperature_R.double(), top_k_R, top_p_R.double(), min_p_R, seeds_R, choices_R, positions_R)
        sample_kernel[(R,)](
            scores_RV, probs_RV, *(t.contiguous() for t in wishes), ids_R, V, scores_RV.stride(0), probs_RV.stride(0),
            sample_columns(V), row_columns(V, 2048), PIVOTS, GREEDY, TINY, SAMPLE,
            num_warps=SAMPLE_WARPS,
        )  # fmt: skip
    return ids_R
