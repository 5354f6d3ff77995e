"""Matrix products whose sums have one order for every number of rows.

T tokens, D input width, F output width; N rows, K input width, M output width, E experts.
"""

import ctypes

import torch
from torch import Tensor

from ..reference.precision import autocast
from ..torch_ops import grouped_gemm as library_grouped
from ..torch_ops import linear as library_linear
from .call import TYPES, Gemm, call, differentiable, fits, pointer


def linear_fits(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> bool:
    return fits(*autocast(x_TD, w_FD, *(() if bias_F is None else (bias_F,))))


def linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    x_TD, w_FD, *bias = autocast(x_TD, w_FD, *(() if bias_F is None else (bias_F,)))
    return differentiable(_linear, library_linear.linear, x_TD, w_FD, *bias)


def grouped_gemm_fits(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> bool:
    return fits(x_NK, w_EKM)


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    def twin(x_NK: Tensor, w_EKM: Tensor) -> Tensor:
        return library_grouped.GroupedGemm.apply(x_NK, w_EKM, ends_E, _grouped)

    if torch.is_grad_enabled() and (x_NK.requires_grad or w_EKM.requires_grad):
        return twin(x_NK, w_EKM)
    return _grouped(x_NK, w_EKM, ends_E)


def _linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    rows_TD = x_TD.reshape(-1, x_TD.shape[-1])
    ends_1 = torch.tensor([len(rows_TD)], dtype=torch.int32)
    return _grouped(rows_TD, w_FD.mT[None], ends_1, bias_F).view(*x_TD.shape[:-1], len(w_FD))


def _grouped(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor, bias_M: Tensor | None = None) -> Tensor:
    x_NK, ends_E = x_NK.contiguous(), ends_E.int().contiguous()
    if 1 not in w_EKM.stride()[1:]:
        w_EKM = w_EKM.contiguous()
    bias_M = None if bias_M is None else bias_M.float().contiguous()
    y_NM = x_NK.new_empty(len(x_NK), w_EKM.shape[2])
    gemm = Gemm(
        x_NK.data_ptr(), w_EKM.data_ptr(), pointer(bias_M), y_NM.data_ptr(),
        *x_NK.shape, w_EKM.shape[2], x_NK.stride(0), *w_EKM.stride(),
    )  # fmt: skip
    experts = ctypes.c_int64(len(w_EKM))
    call("gemm", TYPES[x_NK.dtype], ctypes.byref(gemm), ctypes.c_void_p(ends_E.data_ptr()), experts)
    return y_NM
