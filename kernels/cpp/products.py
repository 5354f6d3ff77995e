"""Matrix products whose sums have one order for every number of rows.

T tokens, D input width, F output width; N rows, K input width, M output width, E experts, H heads.
"""

import functools
import struct

import torch
from torch import Tensor

from ..reference.precision import autocast
from ..torch_ops import grouped_gemm as library_grouped
from ..torch_ops import linear as library_linear
from .build import INSTRUCTIONS, _cpu
from .call import TYPES, call, differentiable, fits, inferring

GEMM = struct.Struct("=16q")  # `Gemm` of gemm.h
# Measured: rows up to which the library takes longer, of one matrix and of each of several; float32: it always does.
ONE, SEVERAL = 256, 512


def linear_fits(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> bool:
    return _fits(x_TD, w_FD, bias_F)


def linear_pays(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> bool:
    return _faster(x_TD.numel() <= ONE * x_TD.shape[-1], x_TD)


def linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        x_TD, w_FD, *bias = autocast(x_TD, w_FD, *(() if bias_F is None else (bias_F,)))
        return differentiable(_linear, library_linear.linear, x_TD, w_FD, *bias)
    return _linear(x_TD, w_FD, bias_F)


def head_gemm_fits(x_THK: Tensor, w_HKM: Tensor) -> bool:
    return _fits(x_THK, w_HKM)


def head_gemm_pays(x_THK: Tensor, w_HKM: Tensor) -> bool:
    return _faster(len(x_THK) <= ONE, x_THK)


def head_gemm(x_THK: Tensor, w_HKM: Tensor) -> Tensor:
    return differentiable(_heads, library_linear.head_gemm, *autocast(x_THK, w_HKM))


def grouped_gemm_fits(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> bool:
    return fits(x_NK, w_EKM)


def grouped_gemm_pays(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> bool:
    return _faster(len(x_NK) <= SEVERAL * len(w_EKM), x_NK)


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (x_NK.requires_grad or w_EKM.requires_grad):
        return library_grouped.GroupedGemm.apply(x_NK, w_EKM, ends_E, _grouped)
    return _grouped(x_NK, w_EKM, ends_E)


def _fits(x: Tensor, w: Tensor, bias: Tensor | None = None) -> bool:
    """As autocast makes them."""
    known = (x, w) if bias is None else (x, w, bias)
    return fits(*(autocast(*(t.new_empty(0) for t in known)) if torch.is_autocast_enabled("cpu") else known))


def _faster(few: bool, x: Tensor) -> bool:
    """On a CPU like the one that was measured."""
    known = x.dtype == torch.float32 or (few and x.dtype == torch.bfloat16)
    return known and inferring(x) and _measured() and not torch.is_autocast_enabled("cpu")


@functools.cache
def _measured() -> bool:
    return INSTRUCTIONS[0][0] <= _cpu()


def _linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    if not (x_TD.is_contiguous() or (x_TD.ndim == 2 and x_TD.stride(1) == 1)):
        x_TD = x_TD.contiguous()
    F, D = w_FD.shape
    by_F, by_D = w_FD.stride()
    if by_F != 1 and by_D != 1:
        w_FD, by_F, by_D = w_FD.contiguous(), D, 1
    if bias_F is not None:
        bias_F = bias_F.contiguous()
    lead = x_TD.shape[:-1]
    y_TF = x_TD.new_empty((*lead, F))
    it = GEMM.pack(
        x_TD.data_ptr(), w_FD.data_ptr(), 0 if bias_F is None else bias_F.data_ptr(), y_TF.data_ptr(), 0,
        lead.numel(), D, F, 1, x_TD.stride(0) if x_TD.ndim == 2 else D, 0, 0, by_D, by_F, F, 0,
    )  # fmt: skip
    call("gemm", TYPES[x_TD.dtype], it)
    return y_TF


def _grouped(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    x_NK, w_EKM, ends_E = _rows(x_NK), _plain(w_EKM), ends_E.int().contiguous()
    (N, K), (E, _, M) = x_NK.shape, w_EKM.shape
    y_NM = x_NK.new_empty(N, M)
    it = GEMM.pack(
        x_NK.data_ptr(), w_EKM.data_ptr(), 0, y_NM.data_ptr(), ends_E.data_ptr(),
        N, K, M, E, x_NK.stride(0), 0, *w_EKM.stride(), M, 0,
    )  # fmt: skip
    call("gemm", TYPES[x_NK.dtype], it)
    return y_NM


def _heads(x_THK: Tensor, w_HKM: Tensor) -> Tensor:
    x_THK, w_HKM = _rows(x_THK), _plain(w_HKM)
    (T, H, K), M = x_THK.shape, w_HKM.shape[2]
    y_THM = x_THK.new_empty(T, H, M)
    it = GEMM.pack(
        x_THK.data_ptr(), w_HKM.data_ptr(), 0, y_THM.data_ptr(), 0,
        T, K, M, H, x_THK.stride(0), x_THK.stride(1), *w_HKM.stride(), H * M, M,
    )  # fmt: skip
    call("gemm", TYPES[x_THK.dtype], it)
    return y_THM


def _rows(x: Tensor) -> Tensor:
    """With each row in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain(w: Tensor) -> Tensor:
    """With rows or columns in one piece each."""
    return w if 1 in w.stride()[-2:] else w.contiguous()
