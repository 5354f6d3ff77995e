"""Products with weights of eight or four bits; rows are taken as they are, or rounded to eight bits as they come.

T tokens, K choices, D input width, F output width; of experts F hidden width.
"""

import torch
from torch import Tensor

from ..quantized import QuantizedWeight, quantize_rows
from .dense import swiglu
from .routing import combine, sort_by_expert

PIECE = 1 << 22
"""Numbers of a weight that are dequantized at once."""


def quantized_linear(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> Tensor:
    y_TF = _product(x_TD.float(), w)
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
    y = [_product(swiglu(_product(x, w_in[e])), w_out[e]) for e, x in enumerate(rows) if len(x)]
    y_ND = torch.cat(y) if y else x_TD.new_zeros(0, x_TD.shape[1], dtype=torch.float32)
    return combine(y_ND, weights_TK, order_N, slot_TK).to(x_TD.dtype)


def _product(x_TD: Tensor, w: QuantizedWeight) -> Tensor:
    """x · wᵀ, some columns at a time, so that no dequantized copy of the weight is ever held."""
    if w.rows == "int8":
        x_TD, scale_T = quantize_rows(x_TD)
    columns = max(PIECE // max(w.depth, 1), 1)
    pieces = (w[first : first + columns] for first in range(0, w.q.shape[-2], columns))
    y_TF = torch.cat([x_TD @ piece.dequantized().mT for piece in pieces], -1)
    return y_TF * scale_T[..., None] if w.rows == "int8" else y_TF
