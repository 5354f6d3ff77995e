"""Cross entropy by the fused library call; and behind the head, in chunks of tokens, so that no T × V logits exist.

T tokens, V vocabulary, D width, n tokens of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..cpp import backward as passes
from ..cpp.call import fits
from ..reference.precision import wide

IGNORED = -100
CHUNK = 1 << 23  # logits that exist at once
FEWEST = 256  # rows of a chunk: fewer make slow products


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    targets = targets_T.masked_fill(targets_T < 0, IGNORED)
    return torch.nn.functional.cross_entropy(wide(logits_TV), targets, ignore_index=IGNORED, reduction="none")


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    learns = torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad)
    return _Chunked.apply(x_TD, w_VD, targets_T, learns)


class _Chunked(Function):
    """The forward pass has the logits, so it computes the gradients (Hsu et al. 2410.10989 §3.2) for losses that count
    alike; the backward pass multiplies them by what the losses do count. If that differs, or the second time, it begins
    anew.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, learns: bool) -> Tensor:
        needed = (learns and ctx.needs_input_grad[0], learns and ctx.needs_input_grad[1])
        losses_T, *gradients = _losses(x_TD.contiguous(), w_VD, targets_T.contiguous(), None, needed)
        ctx.save_for_backward(x_TD, w_VD, targets_T)
        ctx.needed, ctx.gradients = needed, gradients
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TD, w_VD, targets_T = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and len(grad_T) and bool((grad_T == grad_T[0]).all()):
            dx_TD, dw_VD = (None if t is None else t.mul_(grad_T[0].to(t.dtype)) for t in gradients)
        else:
            _, dx_TD, dw_VD = _losses(x_TD.contiguous(), w_VD, targets_T.contiguous(), grad_T, ctx.needed)
        return dx_TD, dw_VD, None, None


def _losses(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, weights_T: Tensor | None, needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses, and where needed the gradients of their weighted sum (float32 or as the weight) in x and w."""
    w, rows = w_VD.to(x_TD.dtype), max(CHUNK // max(len(w_VD), 1), FEWEST)
    space = x_TD.new_empty(min(rows, len(x_TD)), len(w_VD))
    losses_T = wide(x_TD[:0]).new_empty(len(x_TD))
    dx_TD = torch.empty_like(x_TD) if needed[0] else None
    dw_VD = torch.zeros_like(w_VD, memory_format=torch.contiguous_format) if needed[1] else None
    part_VD = torch.empty_like(w) if needed[1] else None
    for start in range(0, len(x_TD), rows):
        part = slice(start, start + rows)
        x_nD, targets_n = x_TD[part], targets_T[part]
        logits_nV = torch.mm(x_nD, w.mT, out=space[: len(x_nD)])
        losses_T[part] = _cross_entropy(logits_nV, targets_n, any(needed))
        if weights_T is not None:
            logits_nV *= weights_T[part, None]
        if dx_TD is not None:
            torch.mm(logits_nV, w, out=dx_TD[part])
        if dw_VD is not None:
            dw_VD += torch.mm(logits_nV.mT, x_nD, out=part_VD)
    return losses_T, dx_TD, dw_VD


def _cross_entropy(logits_nV: Tensor, targets_n: Tensor, learns: bool) -> Tensor:
    """As `cpp.backward.cross_entropy`."""
    if fits(logits_nV):
        return passes.cross_entropy(logits_nV, targets_n, learns)
    logits, counts_n = wide(logits_nV), targets_n >= 0
    targets_n1 = targets_n.clamp_min(0)[:, None]
    log_sum_n = logits.logsumexp(-1)
    losses_n = torch.where(counts_n, log_sum_n - logits.gather(1, targets_n1)[:, 0], 0.0)
    if learns:
        grad_nV = (logits - log_sum_n[:, None]).exp()
        grad_nV.scatter_add_(1, targets_n1, -torch.ones_like(grad_nV[:, :1]))
        logits_nV.copy_(grad_nV * counts_n[:, None])
    return losses_n
