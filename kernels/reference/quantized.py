"""Products with weights of eight or four bits: rows are rounded to eight bits as they come.

T tokens, K choices, D input width, F output width; of experts F hidden width.
"""

import torch
from torch import Tensor

from ..quantized import QuantizedWeight, quantize_rows
from .dense import swiglu
from .routing import combine, sort_by_expert


def quantized_linear(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> Tensor:
    y_TF = _product(x_TD, w.dequantized())
    return (y_TF if bias_F is None else y_TF + bias_F).to(x_TD.dtype)


def quantized_moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> Tensor:
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    order_N, slot_TK, counts_E = sort_by_expert(ids_TK, kept_TK, len(w_in.q))
    rows = x_TD.float()[order_N // ids_TK.shape[1]].split(counts_E.tolist())
    y = [
        _product(swiglu(_product(x, w_HD)), w_DF)
        for x, w_HD, w_DF in zip(rows, w_in.dequantized(), w_out.dequantized(), strict=True)
    ]
    return combine(torch.cat(y), weights_TK, order_N, slot_TK).to(x_TD.dtype)


def _product(x_TD: Tensor, w_FD: Tensor) -> Tensor:
    q_TD, scale_T = quantize_rows(x_TD)
    return q_TD @ w_FD.mT * scale_T[:, None]
