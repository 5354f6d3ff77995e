"""The elementwise parts of a transformer block, each in one pass over its rows, forward and backward.

T tokens, D width, H heads, d head dim, h = d / 2, N rows, F hidden width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..configs import row_columns, row_warps
from .probe import FLOATS, runs

MOST = 1 << 13  # numbers of a row that fit a program: the backward pass of twice as many spills
LINES = 32  # rows whose weight gradients a program adds up


@triton.jit
def rms_norm_kernel(x, weight, out, D, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row."""
    start, at = tl.program_id(0).to(tl.int64) * D, tl.arange(0, WIDTH)
    row = tl.load(x + start + at, mask=at < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
    normed = row * scale * tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(out + start + at, normed.to(out.dtype.element_ty), mask=at < D)


@triton.jit
def add_rms_norm_kernel(x, y, weight, total, out, D, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row of the sum, rounded, and its norm."""
    start, at = tl.program_id(0).to(tl.int64) * D, tl.arange(0, WIDTH)
    row = tl.load(x + start + at, mask=at < D, other=0.0).to(tl.float32)
    row += tl.load(y + start + at, mask=at < D, other=0.0).to(tl.float32)
    rounded = row.to(total.dtype.element_ty)
    tl.store(total + start + at, rounded, mask=at < D)
    row = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
    normed = row * scale * tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(out + start + at, normed.to(out.dtype.element_ty), mask=at < D)


@triton.jit
def rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, weight, grad_x, parts, T, D, eps, LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad x of LINES rows and, in their order, the sum of what they give to the weight."""
    at = tl.arange(0, WIDTH)
    own = tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)
    part = tl.zeros([WIDTH], tl.float32)
    for line in range(0, LINES):
        t = (tl.program_id(0) * LINES + line).to(tl.int64)
        ok = (at < D) & (t < T)
        row = tl.load(x + t * D + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + t * D + at, mask=ok, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
        normed = row * scale
        part += g * normed
        g *= own
        back = scale * (g - normed * (tl.sum(g * normed, 0) / D))
        tl.store(grad_x + t * D + at, back.to(grad_x.dtype.element_ty), mask=ok)
    tl.store(parts + tl.program_id(0).to(tl.int64) * D + at, part, mask=at < D)


@triton.jit
def rope_kernel(  # type: ignore[no-untyped-def]
    x, cosines, sines, out, heads, half, x_token, x_head, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One head of one token turned by its angles, or back by them."""
    token, at = (tl.program_id(0) // heads).to(tl.int64), tl.arange(0, HALF)
    ok = at < half
    cos = tl.load(cosines + token * half + at, mask=ok, other=0.0)
    sin = tl.load(sines + token * half + at, mask=ok, other=0.0)
    sin = -sin if BACK else sin
    source = x + token * x_token + (tl.program_id(0) % heads) * x_head + at
    first = tl.load(source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=ok, other=0.0).to(tl.float32)
    target = out + tl.program_id(0).to(tl.int64) * (2 * half) + at
    tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=ok)
    tl.store(target + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=ok)


@triton.jit
def swiglu_kernel(gate_up, out, F, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = gate_up + row * (2 * F) + column
    gate = tl.load(at, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=column < F, other=0.0).to(tl.float32)
    tl.store(out + row * F + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=column < F)


@triton.jit
def swiglu_backward_kernel(grad, gate_up, out, F, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradients of the gate and of the up projection of some columns of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row * (2 * F) + column
    gate = tl.load(gate_up + at, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + F, mask=column < F, other=0.0).to(tl.float32)
    g = tl.load(grad + row * F + column, mask=column < F, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(out + at, (g * up * (share + silu * (1 - share))).to(out.dtype.element_ty), mask=column < F)
    tl.store(out + at + F, (g * silu).to(out.dtype.element_ty), mask=column < F)


def rms_norm_fits(x_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return runs(x_TD) and weight_D.dtype in FLOATS and x_TD.shape[-1] <= MOST


def rms_norm_pays(x_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return x_TD.is_cuda


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x_TD, weight_D, eps)


def add_rms_norm_fits(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return x_TD.dtype == y_TD.dtype and x_TD.shape == y_TD.shape and rms_norm_fits(x_TD, weight_D, eps)


def add_rms_norm_pays(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return x_TD.is_cuda


def add_rms_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _AddRmsNorm.apply(x_TD, y_TD, weight_D, eps)


def rope_fits(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> bool:
    return runs(x_THd) and turns_h.dtype == torch.float32 and x_THd.shape[-1] <= MOST


def rope_pays(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> bool:
    return x_THd.is_cuda


def rope(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> Tensor:
    """The angles' cosines and sines are the library's, whose bits the reference has."""
    angles_Th = positions_T[:, None] * turns_h
    cos_Th, sin_Th = angles_Th.cos(), angles_Th.sin()
    if magnitude != 1.0:
        cos_Th, sin_Th = cos_Th * magnitude, sin_Th * magnitude
    return _Rope.apply(x_THd, cos_Th, sin_Th)


def rotate_fits(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> bool:
    return runs(x_THd) and cos_Th.dtype == sin_Th.dtype == torch.float32 and x_THd.shape[-1] <= MOST


def rotate_pays(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> bool:
    return x_THd.is_cuda


def rotate(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    return _Rope.apply(x_THd, cos_Th.contiguous(), sin_Th.contiguous())


def swiglu_fits(gate_up_N2F: Tensor) -> bool:
    return runs(gate_up_N2F)


def swiglu_pays(gate_up_N2F: Tensor) -> bool:
    return gate_up_N2F.is_cuda


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    return _Swiglu.apply(gate_up_N2F)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, weight = x_TD.contiguous(), weight_D.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out, D = torch.empty_like(x), x.shape[-1]
        if x.numel():
            width = triton.next_power_of_2(D)
            rms_norm_kernel[(x.numel() // D,)](x, weight, out, D, eps, width, num_warps=row_warps(width))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_norm_backward(grad_TD, x, weight, ctx.eps), None


class _AddRmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, y, weight = x_TD.contiguous(), y_TD.contiguous(), weight_D.contiguous()
        total, out, D = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
        if x.numel():
            width = triton.next_power_of_2(D)
            grid, warps = (x.numel() // D,), row_warps(width)
            add_rms_norm_kernel[grid](x, y, weight, total, out, D, eps, width, num_warps=warps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight = ctx.saved_tensors
        grad_x, grad_weight = _norm_backward(grad_TD, total, weight, ctx.eps)
        grad_x = grad_x + grad_total
        return grad_x, grad_x, grad_weight, None


def _norm_backward(grad_TD: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of what was normalised and of the weight."""
    D = x.shape[-1]
    T = x.numel() // D
    programs, width = triton.cdiv(T, LINES), triton.next_power_of_2(D)
    grad_x, parts = torch.empty_like(x), torch.empty(programs, D, dtype=torch.float32, device=x.device)
    if programs:
        rms_norm_backward_kernel[(programs,)](
            grad_TD.contiguous(), x, weight, grad_x, parts, T, D, eps, LINES, width, num_warps=row_warps(width)
        )
    return grad_x, parts.sum(0).to(weight.dtype)


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Th, sin_Th)
        return _turn(x_THd, cos_Th, sin_Th, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor, None, None]:
        cos_Th, sin_Th = ctx.saved_tensors
        return _turn(grad_THd, cos_Th, sin_Th, back=True), None, None


def _turn(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor, back: bool) -> Tensor:
    x = x_THd if x_THd.stride(-1) == 1 else x_THd.contiguous()
    (T, H, d), out = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        half = triton.next_power_of_2(d // 2)
        rope_kernel[(T * H,)](x, cos_Th, sin_Th, out, H, d // 2, *x.stride()[:2], half, back, num_warps=row_warps(half))
    return out


class _Swiglu(Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        gate_up = gate_up_N2F.contiguous()
        ctx.save_for_backward(gate_up)
        F = gate_up.shape[-1] // 2
        out, columns = gate_up.new_empty(*gate_up.shape[:-1], F), row_columns(F)
        if out.numel():
            swiglu_kernel[(out.numel() // F, triton.cdiv(F, columns))](gate_up, out, F, columns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        F, grad = grad_NF.shape[-1], torch.empty_like(gate_up)
        columns = row_columns(F)
        if grad.numel():
            grid = (grad_NF.numel() // F, triton.cdiv(F, columns))
            swiglu_backward_kernel[grid](grad_NF.contiguous(), gate_up, grad, F, columns)
        return grad
