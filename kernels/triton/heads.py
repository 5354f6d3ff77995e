"""The loss of a row of logits, in one pass forward and one backward.

T tokens, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..configs import row_columns
from .probe import runs

COLUMNS = 4096


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


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        logits = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
        targets, (T, V) = targets_T.contiguous(), logits_TV.shape
        losses, norms = torch.empty(2, T, dtype=torch.float32, device=logits.device)
        if T:
            columns = row_columns(V, COLUMNS)
            cross_entropy_kernel[(T,)](logits, targets, losses, norms, V, logits.stride(0), columns)
        ctx.save_for_backward(logits, targets, norms)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        (T, V), grad = logits.shape, torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if T:
            columns = row_columns(V, COLUMNS)
            cross_entropy_backward_kernel[(T, triton.cdiv(V, columns))](
                grad_T.contiguous(), logits, targets, norms, grad, V, logits.stride(0), columns
            )
        return grad, None
