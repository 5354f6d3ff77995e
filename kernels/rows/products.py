"""Matrix products one row at a time.

T tokens, D input width, F output width; N rows, K input width, M output width, E experts, H heads.
"""

import torch
from torch import Tensor

from .. import registry
from ..reference.precision import autocast, wide


def linear(x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    x_TD, w_FD, *bias = autocast(x_TD, w_FD, *(() if bias_F is None else (bias_F,)))
    rows = [_times(x_D, wide(w_FD), *bias) for x_D in wide(x_TD).reshape(-1, x_TD.shape[-1])]
    y_TF = torch.stack(rows) if rows else wide(x_TD).new_zeros(0, len(w_FD))
    return y_TF.view(*x_TD.shape[:-1], len(w_FD)).to(x_TD.dtype)


def grouped_gemm(x_NK: Tensor, w_EKM: Tensor, ends_E: Tensor) -> Tensor:
    owners = torch.searchsorted(ends_E, torch.arange(len(x_NK), dtype=ends_E.dtype), right=True).tolist()
    w_EMK = wide(w_EKM).mT.contiguous()
    rows = [_times(x_K, w_EMK[expert]) for x_K, expert in zip(wide(x_NK), owners, strict=True)]
    return (torch.stack(rows) if rows else x_NK @ w_EKM.sum(0)).to(x_NK.dtype)


def head_gemm(x_THK: Tensor, w_HKM: Tensor) -> Tensor:
    """A grouped product whose experts are the heads, in whatever form that has."""
    heads, tokens = len(w_HKM), len(x_THK)
    ends_H = tokens * torch.arange(1, heads + 1, dtype=torch.int32)
    rows_NK = x_THK.transpose(0, 1).flatten(0, 1)
    y_NM = registry.call("grouped_gemm", rows_NK, w_HKM.to(x_THK.dtype), ends_H)
    return y_NM.view(heads, tokens, -1).transpose(0, 1)


def _times(x_D: Tensor, w_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    y_F = (w_FD * x_D).sum(-1)
    return y_F if bias_F is None else y_F + bias_F
