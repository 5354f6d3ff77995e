"""The experts of a layer, from rows to rows.

T tokens, K choices, N rows, D width, E experts, F hidden width, H = 2F.
"""

import torch
from torch import Tensor

from .dense import swiglu
from .grouped_gemm import grouped_gemm
from .routing import combine, permute, sort_by_expert


def moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> Tensor:
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    order_N, slot_TK, counts_E = sort_by_expert(ids_TK, kept_TK, len(w_in_EHD))
    ends_E = counts_E.cumsum(0).int()
    y_ND = expert_rows(permute(x_TD, order_N, slot_TK), ends_E, w_in_EHD, w_out_EFD)
    return combine(y_ND, weights_TK, order_N, slot_TK)


def expert_rows(x_ND: Tensor, ends_E: Tensor, w_in_EHD: Tensor, w_out_EFD: Tensor) -> Tensor:
    w_in_EHD, w_out_EFD = w_in_EHD.to(x_ND.dtype), w_out_EFD.to(x_ND.dtype)
    return grouped_gemm(swiglu(grouped_gemm(x_ND, w_in_EHD.mT, ends_E)), w_out_EFD, ends_E)
