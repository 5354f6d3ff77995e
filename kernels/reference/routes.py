"""What is noted of routings. L layers, T tokens, E experts, K choices, S slots, N numbers a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .gates import sigmoid_shares


def tally_routes(
    sums_LN: Tensor, logits: Sequence[Tensor], choices: Sequence[Tensor], wanted: Sequence[Tensor],
    kept: Sequence[Tensor], valid_T: Tensor | None = None, shares: Sequence[Tensor] | None = None,
    sigmoid: bool = False,
) -> None:  # fmt: skip
    logits_LTE, choice_LTK, wanted_LTK, kept_LTK = map(torch.stack, map(tuple, (logits, choices, wanted, kept)))
    probs_LTE = torch.stack(tuple(shares)) if shares is not None else _probs(logits_LTE, sigmoid)
    layers, tokens, top_k = choice_LTK.shape
    entropy_LT = torch.special.entr(probs_LTE).sum(2)
    norm_LT = torch.linalg.vector_norm(logits_LTE, dim=2)
    dropped_L = (wanted_LTK & ~kept_LTK).sum((1, 2))
    if valid_T is None:
        tokens_L = dropped_L.new_full((layers,), tokens)
    else:
        entropy_LT, norm_LT = torch.where(valid_T, entropy_LT, 0), torch.where(valid_T, norm_LT, 0)
        tokens_L = valid_T.sum().expand(layers)
    counts_LE = wanted_LTK.new_zeros(layers, logits_LTE.shape[2], dtype=torch.int64)
    counts_LE.scatter_add_(1, choice_LTK.flatten(1), wanted_LTK.flatten(1).long())
    rest = (dropped_L, tokens_L * top_k, entropy_LT.double().sum(1), norm_LT.double().sum(1), tokens_L)
    found_LN = torch.cat([counts_LE.double(), torch.stack([number_L.double() for number_L in rest], 1)], 1)
    sums_LN += found_LN.to(sums_LN.device)


def store_routes(pages_SLK: Tensor, slots_T: Tensor, ids: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    ids_TLK, kept_TLK = torch.stack(tuple(ids), 1), torch.stack(tuple(kept), 1)
    pages_SLK[slots_T] = torch.where(kept_TLK, ids_TLK, -1 - ids_TLK).to(pages_SLK.dtype)


def _probs(logits_LTE: Tensor, sigmoid: bool) -> Tensor:
    return sigmoid_shares(logits_LTE) if sigmoid else logits_LTE.softmax(-1)
