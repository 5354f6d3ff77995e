"""Products with weights of eight or four bits one row at a time.

T tokens, K choices, D input width, F output width.
"""

import torch
from torch import Tensor

from ..quantized import QuantizedWeight
from ..reference import quantized as reference


def quantized_linear(x_TD: Tensor, w: QuantizedWeight, bias_F: Tensor | None = None) -> Tensor:
    rows = x_TD.reshape(-1, w.depth).split(1)
    y_TF = torch.cat([reference.quantized_linear(row.clone(), w, bias_F) for row in rows])  # a clone is aligned
    return y_TF.view(*x_TD.shape[:-1], y_TF.shape[1])


def quantized_moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor | None,
    w_in: QuantizedWeight,
    w_out: QuantizedWeight,
) -> Tensor:
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
    tokens = zip(x_TD.split(1), ids_TK.split(1), weights_TK.split(1), kept_TK.split(1), strict=True)
    return torch.cat([reference.quantized_moe_mlp(x, ids, by, kept, w_in, w_out) for x, ids, by, kept in tokens])
