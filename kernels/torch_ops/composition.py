"""The experts of a layer, one operation after another, each in the form that suits it.

T tokens, K choices, D width, E experts, F hidden width, H = 2F.
"""

import torch
from torch import Tensor

from .. import ops


def moe_mlp(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None, w_in_EHD: Tensor, w_out_EFD: Tensor
) -> Tensor:
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    order_N, slot_TK, counts_E = ops.sort_by_expert(ids_TK, kept_TK, len(w_in_EHD))
    ends_E = counts_E.cumsum(0).int()
    w_in_EHD, w_out_EFD = w_in_EHD.to(x_TD.dtype), w_out_EFD.to(x_TD.dtype)
    h_NF = ops.swiglu(ops.grouped_gemm(ops.permute(x_TD, order_N, slot_TK), w_in_EHD.mT, ends_E))
    return ops.combine(ops.grouped_gemm(h_NF, w_out_EFD, ends_E), weights_TK, order_N, slot_TK)
