"""Fetching rows for the experts and adding their results up again: gathers in both directions, every sum in one order.

T tokens, K choices, P = T·K assignments, D width, N rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..configs import row_columns
from .probe import FLOATS, runs


@triton.jit
def fetch_kernel(x, order, out, D, K, x_row, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[n] = x[order[n] // K]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = (tl.load(order + row) // K).to(tl.int64)
    tl.store(out + row * D + column, tl.load(x + token * x_row + column, mask=column < D), mask=column < D)


@triton.jit
def gather_sum_kernel(rows, weights, slots, out, D, K, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[t] = Σ_k weights[t, k] · rows[slots[t, k]], k ascending; a slot of -1 is neither read nor counted."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for k in range(0, K):
        slot = tl.load(slots + token * K + k).to(tl.int64)
        term = tl.load(rows + slot * D + column, mask=(column < D) & (slot >= 0), other=0.0).to(tl.float32)
        if weights is not None:
            term = tl.where(slot >= 0, term * tl.load(weights + token * K + k).to(tl.float32), 0.0)
        total += term
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def combine_backward_kernel(  # type: ignore[no-untyped-def]
    grad, y, weights, slots, grad_y, grad_weights, D, K, grad_row, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one assignment: grad_y[slot] = weight · grad[t] and grad_weight = grad[t] · y[slot]."""
    flat = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + flat).to(tl.int64)
    if slot < 0:
        tl.store(grad_weights + flat, 0.0)
        return
    weight = tl.load(weights + flat).to(tl.float32)
    products = tl.zeros([COLUMNS], tl.float32)
    for done in range(0, D, COLUMNS):
        column = done + tl.arange(0, COLUMNS)
        g = tl.load(grad + flat // K * grad_row + column, mask=column < D, other=0.0).to(tl.float32)
        products += g * tl.load(y + slot * D + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(grad_y + slot * D + column, (g * weight).to(grad_y.dtype.element_ty), mask=column < D)
    tl.store(grad_weights + flat, tl.sum(products, 0).to(grad_weights.dtype.element_ty))


def fetch(x_TD: Tensor, order_N: Tensor, choices: int) -> Tensor:
    """out[n] = x[order[n] // choices]."""
    N, D = len(order_N), x_TD.shape[1]
    out_ND = x_TD.new_empty(N, D)
    if out_ND.numel():
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        columns = row_columns(D)
        fetch_kernel[(N, triton.cdiv(D, columns))](x_TD, order_N, out_ND, D, choices, x_TD.stride(0), columns)
    return out_ND


def gather_sum(rows_ND: Tensor, weights_TK: Tensor | None, slot_TK: Tensor) -> Tensor:
    """out[t] = Σ_k weights[t, k] · rows[slot[t, k]] in float32, k ascending, in the rows' dtype."""
    (T, K), D = slot_TK.shape, rows_ND.shape[1]
    out_TD = rows_ND.new_empty(T, D)
    if out_TD.numel():
        columns = row_columns(D)
        weights = None if weights_TK is None else weights_TK.contiguous()
        rows, slots = rows_ND.contiguous(), slot_TK.contiguous()
        gather_sum_kernel[(T, triton.cdiv(D, columns))](rows, weights, slots, out_TD, D, K, columns)
    return out_TD


def permute_fits(x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> bool:
    return runs(x_TD)


def permute_pays(x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> bool:
    return x_TD.is_cuda


def permute(x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    return _Permute.apply(x_TD, order_N, slot_TK)


def combine_fits(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, slot_TK: Tensor) -> bool:
    return runs(y_ND) and weights_TK.dtype in FLOATS


def combine_pays(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, slot_TK: Tensor) -> bool:
    return y_ND.is_cuda


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    return _Combine.apply(y_ND, weights_TK, slot_TK)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return fetch(x_TD, order_N, slot_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return gather_sum(grad_ND, None, slot_TK), None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, slot_TK)
        return gather_sum(y_ND, weights_TK, slot_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        y_ND, weights_TK, slot_TK = (t.contiguous() for t in ctx.saved_tensors)
        grad_TD = grad_TD if grad_TD.stride(1) == 1 else grad_TD.contiguous()
        grad_y, grad_weights = torch.empty_like(y_ND), torch.empty_like(weights_TK)
        if grad_weights.numel():
            D = y_ND.shape[1]
            combine_backward_kernel[(slot_TK.numel(),)](
                grad_TD, y_ND, weights_TK, slot_TK, grad_y, grad_weights,
                D, slot_TK.shape[1], grad_TD.stride(0), row_columns(D),
            )  # fmt: skip
        return grad_y, grad_weights, None
