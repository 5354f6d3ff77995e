"""Norm, activation and rotation, each row in one order of operations wherever it lies.

T tokens, D width, N rows, F hidden width, H heads, d head dim, h = d / 2. `*_pays`: what needs no gradient is computed
at once; the composition makes several passes over the rows.
"""

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from ..reference import dense
from .call import TYPES, differentiable, fits, inferring, kernel

NORM = (c_int, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int)
ROTATE = (c_int, c_void_p, c_void_p, c_void_p, c_void_p, *(c_int64,) * 5, c_int)
SWIGLU = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int)


def pays(x: Tensor) -> bool:
    """bfloat16 on a CPU, and nothing learns."""
    return x.dtype == torch.bfloat16 and inferring(x)


def rms_norm_pays(x_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return pays(x_TD)


def rms_norm_fits(x_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return fits(x_TD) and fits(weight_D)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    def run(x_TD: Tensor, weight_D: Tensor) -> Tensor:
        x_TD = x_TD.contiguous()
        y_TD = torch.empty_like(x_TD)
        _norm(x_TD, None, weight_D, None, y_TD, eps)
        return y_TD

    return differentiable(run, lambda x, weight: dense.rms_norm(x, weight, eps), x_TD, weight_D)


def add_rms_norm_pays(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return pays(x_TD)


def add_rms_norm_fits(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return x_TD.dtype == y_TD.dtype and x_TD.shape == y_TD.shape and fits(x_TD, y_TD) and fits(weight_D)


def add_rms_norm(x_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (x_TD.requires_grad or y_TD.requires_grad or weight_D.requires_grad):
        sum_TD = x_TD + y_TD
        return sum_TD, rms_norm(sum_TD, weight_D, eps)
    x_TD = x_TD.contiguous()
    sum_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    _norm(x_TD, y_TD.contiguous(), weight_D, sum_TD, normed_TD, eps)
    return sum_TD, normed_TD


def _norm(
    x_TD: Tensor, y_TD: Tensor | None, weight_D: Tensor, sum_TD: Tensor | None, normed_TD: Tensor, eps: float
) -> None:
    width, weight_D = x_TD.shape[-1], weight_D.contiguous()
    kernel("turnout_add_rms_norm", NORM)(
        TYPES[x_TD.dtype], x_TD.data_ptr(), None if y_TD is None else y_TD.data_ptr(), TYPES[weight_D.dtype],
        weight_D.data_ptr(), None if sum_TD is None else sum_TD.data_ptr(), normed_TD.data_ptr(),
        x_TD.numel() // width if width else 0, width, eps, torch.get_num_threads(),
    )  # fmt: skip


def rotate_pays(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> bool:
    return pays(x_THd)


def rotate_fits(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> bool:
    return fits(x_THd) and fits(cos_Th, sin_Th) and cos_Th.dtype == torch.float32


def rotate(x_THd: Tensor, cos_Th: Tensor, sin_Th: Tensor) -> Tensor:
    def run(x_THd: Tensor) -> Tensor:
        x_THd = x_THd if x_THd.stride(2) == 1 else x_THd.contiguous()
        y_THd, cos, sin = torch.empty(x_THd.shape, dtype=x_THd.dtype), cos_Th.contiguous(), sin_Th.contiguous()
        tokens, heads, d = x_THd.shape
        kernel("turnout_rotate", ROTATE)(
            TYPES[x_THd.dtype], x_THd.data_ptr(), cos.data_ptr(), sin.data_ptr(), y_THd.data_ptr(),
            tokens, heads, d // 2, x_THd.stride(0), x_THd.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return y_THd

    return differentiable(run, lambda x: dense.rotate(x, cos_Th, sin_Th), x_THd)


def swiglu_pays(gate_up_N2F: Tensor) -> bool:
    return pays(gate_up_N2F)


def swiglu_fits(gate_up_N2F: Tensor) -> bool:
    return fits(gate_up_N2F)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    return differentiable(_swiglu, dense.swiglu, gate_up_N2F)


def _swiglu(gate_up_N2F: Tensor) -> Tensor:
    x_N2F, hidden = gate_up_N2F.contiguous(), gate_up_N2F.shape[-1] // 2
    y_NF = x_N2F.new_empty(*x_N2F.shape[:-1], hidden)
    rows, threads = y_NF.numel() // hidden if hidden else 0, torch.get_num_threads()
    kernel("turnout_swiglu", SWIGLU)(TYPES[x_N2F.dtype], x_N2F.data_ptr(), y_NF.data_ptr(), rows, hidden, threads)
    return y_NF
