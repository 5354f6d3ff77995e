"""The loss of a row of logits, in one pass forward and one backward; and behind the head, in chunks of tokens.

The chunks' products are the library's. Their logits are computed again for the backward pass, so that neither they nor
anything else of their size is kept, and nothing need be asked of the device about what the losses count.

T tokens, V vocabulary, D width, n tokens of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..configs import row_columns
from .probe import FLOATS, runs

COLUMNS = 4096
CHUNK = 1 << 27  # logits that exist at once
FEWEST = 1024  # rows of a chunk: fewer make slow products


@triton.jit
def cross_entropy_kernel(logits, targets, losses, norms, V, row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """logsumexp(logits) - logits[target]; each of COLUMNS lanes has its own maximum and sum until the end."""
    t = tl.program_id(0).to(tl.int64)
    top = tl.full([COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for done in range(0, V, COLUMNS):
        at = done + tl.arange(0, COLUMNS)
        x = tl.load(logits + t * row + at, mask=at < V, other=-float("inf")).to(tl.float32)
        highest = tl.maximum(top, x)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = highest
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    norm = base + tl.log(tl.sum(total * tl.exp(top - base), 0))
    target = tl.load(targets + t).to(tl.int64)
    picked = tl.load(logits + t * row + target, mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(losses + t, tl.where(target >= 0, norm - picked, 0.0))
    tl.store(norms + t, norm)


@triton.jit
def cross_entropy_backward_kernel(  # type: ignore[no-untyped-def]
    grad, logits, targets, norms, out, V, row, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad · (softmax(logits) - 1 at the target); zero where the target is negative."""
    t, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(targets + t)
    x = tl.load(logits + t * row + at, mask=at < V, other=0.0).to(tl.float32)
    share = tl.exp(x - tl.load(norms + t)) - tl.where(at == target, 1.0, 0.0)
    back = tl.where(target >= 0, tl.load(grad + t) * share, 0.0)
    tl.store(out + t * V + at, back.to(out.dtype.element_ty), mask=at < V)


def cross_entropy_fits(logits_TV: Tensor, targets_T: Tensor) -> bool:
    return runs(logits_TV)


def cross_entropy_pays(logits_TV: Tensor, targets_T: Tensor) -> bool:
    return logits_TV.is_cuda


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return _CrossEntropy.apply(logits_TV, targets_T)


def linear_cross_entropy_fits(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> bool:
    return runs(x_TD) and w_VD.dtype in FLOATS


def linear_cross_entropy_pays(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> bool:
    return x_TD.is_cuda


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    return _LinearCrossEntropy.apply(x_TD, w_VD, targets_T)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        logits = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
        targets = targets_T.contiguous()
        losses, norms = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
        _losses(logits, targets, losses, norms)
        ctx.save_for_backward(logits, targets, norms)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _gradients(grad_T.contiguous(), logits, targets, norms, grad)
        return grad, None


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
        targets = targets_T.contiguous()
        losses, norms = torch.empty(2, len(x_TD), dtype=torch.float32, device=x_TD.device)
        for part, logits_nV in _chunks(x_TD, w_VD.to(x_TD.dtype)):
            _losses(logits_nV, targets[part], losses[part], norms[part])
        ctx.save_for_backward(x_TD, w_VD, targets, norms)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The weight's gradient is added up in float32, chunk by chunk."""
        x_TD, w_VD, targets, norms = ctx.saved_tensors
        w, grad_T = w_VD.to(x_TD.dtype), grad_T.contiguous()
        needs_x, needs_w, _ = ctx.needs_input_grad
        dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if needs_x else None
        dw_VD = torch.zeros(w.shape, dtype=torch.float32, device=w.device) if needs_w else None
        for part, logits_nV in _chunks(x_TD, w):
            _gradients(grad_T[part], logits_nV, targets[part], norms[part], logits_nV)
            if dx_TD is not None:
                torch.mm(logits_nV, w, out=dx_TD[part])
            if dw_VD is not None:
                dw_VD += logits_nV.mT @ x_TD[part]
        return dx_TD, None if dw_VD is None else dw_VD.to(w_VD.dtype), None


def _chunks(x_TD: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits of some tokens at a time, in memory that is used again for the next."""
    rows = max(CHUNK // max(len(w), 1), FEWEST)
    space = x_TD.new_empty(min(rows, len(x_TD)), len(w))
    for start in range(0, len(x_TD), rows):
        part = slice(start, start + rows)
        x_nD = x_TD[part]
        yield part, torch.mm(x_nD, w.mT, out=space[: len(x_nD)])


def _losses(logits: Tensor, targets: Tensor, losses: Tensor, norms: Tensor) -> None:
    T, V = logits.shape
    if T:
        cross_entropy_kernel[(T,)](logits, targets, losses, norms, V, logits.stride(0), row_columns(V, COLUMNS))


def _gradients(grad_T: Tensor, logits: Tensor, targets: Tensor, norms: Tensor, out: Tensor) -> None:
    """`out` may be the logits."""
    (T, V), columns = logits.shape, row_columns(logits.shape[1], COLUMNS)
    if T:
        grid = (T, triton.cdiv(V, columns))
        cross_entropy_backward_kernel[grid](grad_T, logits, targets, norms, out, V, logits.stride(0), columns)
