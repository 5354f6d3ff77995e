"""Pruning by a score of each weight alone: its magnitude, or Wanda's.

F output width, D input width, E experts.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...configs.typed import check
from .seen import Seen
from .sparsity import Sparsity

Named = Iterable[tuple[str, Tensor]]


def magnitude(w_FD: Tensor, sparsity: Sparsity) -> Tensor:
    """Without the weights of smallest |w| (Han et al. 1506.02626); of a stack [..., F, D] those of each matrix."""
    return w_FD.masked_fill(weakest(w_FD.abs(), sparsity), 0)


def wanda(w_FD: Tensor, seen: Seen, sparsity: Sparsity) -> Tensor:
    """Without the weights of smallest |w_ij| · ‖x_j‖₂ of each output's row (Sun et al. 2306.11695, eq. 1)."""
    score_FD = w_FD.abs().to(seen.square_D.dtype) * seen.square_D.sqrt()
    if sparsity.span is not None:
        return w_FD.masked_fill(weakest(score_FD, sparsity), 0)
    return w_FD.masked_fill(lowest(score_FD, round(sparsity.share * w_FD.shape[-1])), 0)


def weakest(score_FD: Tensor, sparsity: Sparsity) -> Tensor:
    """True where the score is among the lowest of its matrix, or of its span; of equal ones the first go.

    Args:
        score_FD: [..., F, D] without NaN.
    """
    parts = score_FD.flatten(-2) if sparsity.span is None else score_FD.unflatten(-1, (-1, sparsity.span))
    return lowest(parts, round(sparsity.share * parts.shape[-1])).view_as(score_FD)


def lowest(score_N: Tensor, count: int) -> Tensor:
    """True at the `count` lowest along the last dimension; of equal ones the first."""
    if not count:
        return torch.zeros_like(score_N, dtype=torch.bool)
    last = score_N.kthvalue(count, -1, keepdim=True).values
    below, equal = score_N < last, score_N == last
    return below | (equal & (equal.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


def global_shares(matrices: Callable[[], Named], share: float) -> dict[str, float]:
    """The share of each matrix with which `magnitude` prunes all of them at one threshold.

    Three passes, one matrix held at a time. The threshold is exact: the bits of a positive float32, read as a whole
    number, are in the order of the floats, so it is found by counting the upper sixteen, then the lower ones.

    Args:
        matrices: gives all of them by name, the same at every call.
        share: of all weights; they are compared in float32, of equal ones the first go.
    """
    check(0 <= share < 1, "share", share, "must be at least 0 and below 1", "use 0.5")
    upper = sum((_counts(_bits(w) >> 16) for _, w in matrices()), torch.zeros(1 << 16, dtype=torch.int64))
    count = round(share * int(upper.sum()))
    high, left = _reach(upper, count)
    inside = (_bits(w) for _, w in matrices())
    lower = sum((_counts(b[b >> 16 == high] & 0xFFFF) for b in inside), torch.zeros_like(upper))
    low, ties = _reach(lower, left)
    last, shares = high << 16 | low, {}
    for name, w in matrices():
        bits = _bits(w)
        taken = min(ties, int((bits == last).sum()))
        shares[name], ties = (int((bits < last).sum()) + taken) / bits.numel(), ties - taken
    return shares


def _bits(w: Tensor) -> Tensor:
    return w.detach().float().abs().view(torch.int32).flatten()


def _counts(bins: Tensor) -> Tensor:
    return torch.bincount(bins, minlength=1 << 16)


def _reach(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted` first numbers end, and how many of it they are."""
    upto = counts.cumsum(0)
    at = int(torch.searchsorted(upto, wanted))
    return at, wanted - int(upto[at] - counts[at])
