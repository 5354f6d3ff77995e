"""Norm and activation, each row in one order of operations wherever it lies.

T tokens, D width, N rows, F hidden width.
"""

from ctypes import c_float, c_int64, c_void_p

from torch import Tensor

from ..reference import dense
from .call import TYPES, call, differentiable, fits


def rms_norm_fits(x_TD: Tensor, weight_D: Tensor, eps: float) -> bool:
    return fits(x_TD) and fits(weight_D)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    def run(x_TD: Tensor, weight_D: Tensor) -> Tensor:
        x_TD, weight_D = x_TD.contiguous(), weight_D.float().contiguous()
        y_TD = x_TD.new_empty(x_TD.shape)
        width = x_TD.shape[-1]
        places = (c_void_p(t.data_ptr()) for t in (x_TD, weight_D, y_TD))
        call("rms_norm", TYPES[x_TD.dtype], *places, c_int64(x_TD.numel() // width), c_int64(width), c_float(eps))
        return y_TD

    return differentiable(run, lambda x, weight: dense.rms_norm(x, weight, eps), x_TD, weight_D)


def swiglu_fits(gate_up_N2F: Tensor) -> bool:
    return fits(gate_up_N2F)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    return differentiable(_swiglu, dense.swiglu, gate_up_N2F)


def _swiglu(gate_up_N2F: Tensor) -> Tensor:
    x_N2F, hidden = gate_up_N2F.contiguous(), gate_up_N2F.shape[-1] // 2
    y_NF = x_N2F.new_empty(*x_N2F.shape[:-1], hidden)
    rows = c_int64(y_NF.numel() // hidden)
    call("swiglu", TYPES[x_N2F.dtype], c_void_p(x_N2F.data_ptr()), c_void_p(y_NF.data_ptr()), rows, c_int64(hidden))
    return y_NF
