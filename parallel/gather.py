"""Two exchanges that are each other's gradient: all ranks' tokens on each, and sums of which each keeps its tokens.
And two without a gradient, of layers that divide their output features alone.

    x of a rank's own tokens       →  x of all tokens, rank after rank      all-gather
    a rank's term of all tokens    →  the sum for a rank's own tokens       reduce-scatter
    a rank's features, all tokens  →  all features of all tokens            all-gather
    a rank's features, all tokens  →  all features of a rank's own tokens   all-to-all

A sum's terms travel in their own dtype and are added in float32 (float64 stays), in the order of the ranks: the same
bits however the network works, and every time.

P ranks, T tokens held here, A = P · T tokens of all of them, f features held here, F = P · f.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.reference.precision import wide
from .process import naming


def gather(x_T: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """[T, ...], as many on every rank → [A, ...]. Differentiable, collective over `group`; `what` names it in errors.

    Raises:
        PeerError: a peer died or hangs, here or in the backward pass.
    """
    return _Gather.apply(x_T, group, what)


def scatter_sum(y_A: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """Terms [A, ...] → their sum over ranks, for the T tokens of this one. Otherwise as `gather`."""
    return _ScatterSum.apply(y_A, group, what)


def gather_features(x_Af: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """[A, f] → [A, F], rank after rank. Carries no gradient; collective over `group`; `what` names it in errors.

    Raises:
        PeerError: a peer died or hangs.
    """
    x_PAf = _gathered(x_Af, group, f"gathering of {what}").unflatten(0, (group.size(), len(x_Af)))
    return x_PAf.transpose(0, 1).flatten(1)


def scatter_tokens(y_Af: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """[A, f] → [T, F], rank after rank, for the T tokens of this one. Otherwise as `gather_features`."""
    y_PTf = _turned(y_Af, group, f"exchange of {what}")
    return y_PTf.transpose(0, 1).flatten(1)


class _Gather(torch.autograd.Function):
    """Every rank's gradient holds a term of every token's."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what = group, what
        return _gathered(x_T, group, f"gathering of {what}")

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad_A, ctx.group, f"sum of the gradients of {ctx.what}"), None, None


class _ScatterSum(torch.autograd.Function):
    """Every rank's term has the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, y_A: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what = group, what
        return _summed(y_A, group, f"sum of {what}")

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad_T, ctx.group, f"gathering of the gradients of {ctx.what}"), None, None


def _gathered(x_T: Tensor, group: dist.ProcessGroup, operation: str) -> Tensor:
    x_PT = x_T.new_empty(group.size(), *x_T.shape)
    with naming(operation):
        dist.all_gather(list(x_PT.unbind()), x_T.contiguous(), group=group)
    return x_PT.flatten(0, 1)


def _summed(y_A: Tensor, group: dist.ProcessGroup, operation: str) -> Tensor:
    """By an all-to-all, as many bytes as a reduce-scatter of these terms."""
    return wide(_turned(y_A, group, operation)).sum(0).to(y_A.dtype)


def _turned(y_A: Tensor, group: dist.ProcessGroup, operation: str) -> Tensor:
    """What every rank has for the T tokens of this one: [P, T, ...]."""
    found_A = torch.empty_like(y_A, memory_format=torch.contiguous_format)
    with naming(operation):
        dist.all_to_all_single(found_A, y_A.contiguous(), group=group)
    return found_A.unflatten(0, (group.size(), len(y_A) // group.size()))
