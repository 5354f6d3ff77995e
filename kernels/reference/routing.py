"""Sorting assignments by expert, fetching their rows and adding the results up again.

T tokens, K choices, D width, E experts, N rows = kept assignments.
"""

import torch
from torch import Tensor

from .precision import wide


def sort_by_expert(ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat, kept = ids_TK.flatten(), kept_TK.flatten()
    orders = [(kept & (flat == expert)).nonzero().flatten() for expert in range(num_experts)]
    order_N = torch.cat(orders)
    slot = torch.full_like(flat, -1)
    slot[order_N] = torch.arange(order_N.numel(), device=flat.device)
    counts = torch.tensor([order.numel() for order in orders], device=flat.device)
    return order_N, slot.view_as(ids_TK), counts


def permute(x_TD: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    return wide(x_TD)[order_N // slot_TK.shape[1]].to(x_TD.dtype)


def combine(y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, slot_TK: Tensor) -> Tensor:
    T, K = slot_TK.shape
    zero = y_ND.new_zeros(1, y_ND.shape[1])
    rows_TKD = wide(torch.cat((y_ND, zero))[slot_TK])  # slot -1 reads the zero row
    out_TD = rows_TKD.new_zeros(T, y_ND.shape[1])
    for k in range(K):
        out_TD = out_TD + weights_TK[:, k : k + 1] * rows_TKD[:, k]
    return out_TD.to(y_ND.dtype)
