"""One stable sort, and gathers in both directions: no scatter-add, so every sum has one order. On a CPU a gather with
its sum is one pass over memory.

T tokens, K choices, D width, E experts, N rows = kept assignments.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..cpp import backward as passes
from ..cpp.call import fits
from ..reference.precision import wide


def sort_by_expert(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    keys = ids_TK.masked_fill(~kept_TK, num_experts).flatten()
    counts_E = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    order = keys.argsort(stable=True)  # dropped ones last
    rows = torch.arange(order.numel(), device=order.device)
    slot = torch.empty_like(order).index_copy_(0, order, rows).view_as(ids_TK)
    return order[: int(counts_E.sum())], slot.masked_fill(~kept_TK, -1), counts_E


def permute(x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    return _Permute.apply(x_TD, order_N, slot_TK)


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    return _Combine.apply(y_ND, weights_TK, order_N, slot_TK)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return x_TD.index_select(0, order_N // slot_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return gather_sum(grad_ND, None, slot_TK), None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, order_N, slot_TK)
        return gather_sum(y_ND, weights_TK, slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y_ND, weights_TK, order_N, slot_TK = ctx.saved_tensors
        if _passes(grad_TD, weights_TK, y_ND) and all(ctx.needs_input_grad[:2]):
            operands = (t.contiguous() for t in (grad_TD, y_ND, order_N, weights_TK))
            return *passes.gather_sum_backward(*operands), None, None
        grad_ND = wide(grad_TD.index_select(0, order_N // slot_TK.shape[1]))
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_y = (grad_ND * weights_TK.flatten()[order_N, None]).to(y_ND.dtype)
        if ctx.needs_input_grad[1]:
            per_row = (grad_ND * y_ND).sum(1).to(weights_TK.dtype)
            grad_weights = weights_TK.new_zeros(weights_TK.numel()).index_copy_(0, order_N, per_row).view_as(weights_TK)
        return grad_y, grad_weights, None, None


def gather_sum(rows_ND: Tensor, weights_TK: Tensor | None, slot_TK: Tensor) -> Tensor:
    """out[t] = sum over k, ascending, of weights[t, k] · rows[slot[t, k]]; dropped ones never read or counted."""
    if _passes(rows_ND, weights_TK):
        weights_TK = None if weights_TK is None else weights_TK.contiguous()
        return passes.gather_sum(rows_ND.contiguous(), slot_TK.contiguous(), weights_TK)
    total = wide(rows_ND[:0]).new_zeros(slot_TK.shape[0], rows_ND.shape[1])
    if rows_ND.shape[0] == 0:
        return total.to(rows_ND.dtype)
    for k in range(slot_TK.shape[1]):
        term = wide(rows_ND.index_select(0, slot_TK[:, k].clamp_min(0)))
        if weights_TK is not None:
            term = term * weights_TK[:, k, None]
        total += term.masked_fill(slot_TK[:, k, None] < 0, 0.0)
    return total.to(rows_ND.dtype)


def _passes(rows_ND: Tensor, weights_TK: Tensor | None, *others: Tensor) -> bool:
    """Whether the kernels of one pass take them."""
    return (weights_TK is None or weights_TK.dtype == torch.float32) and fits(rows_ND, *others)
