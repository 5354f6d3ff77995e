"""The choice of experts and their weights, from a router's logits.

T tokens, E experts, K choices, G groups of e neighbouring experts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import registry


def top_k_gates(
    logits_TE: Tensor, top_k: int, *, ids_TK: Tensor | None = None, score: str = "softmax",
    bias_E: Tensor | None = None, groups: int = 1, top_groups: int = 1, best: int = 1, renormalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if ids_TK is None:
        rank_TE = logits_TE.detach()
        rank_TE = sigmoid(rank_TE) if score == "sigmoid" else rank_TE
        rank_TE = rank_TE if bias_E is None else rank_TE + bias_E
        ids_TK = top_k_lowest_index(within_best_groups(rank_TE, groups, top_groups, best), top_k)
    weights_TK = _weights(logits_TE, ids_TK, score, renormalize)
    return ids_TK, weights_TK if scale == 1 else scale * weights_TK


def _weights(logits_TE: Tensor, ids_TK: Tensor, score: str, renormalize: bool) -> Tensor:
    if score == "chosen":
        return logits_TE.gather(1, ids_TK).softmax(-1)
    if score == "sigmoid":
        return sigmoid_shares(logits_TE.gather(1, ids_TK)) if renormalize else sigmoid(logits_TE).gather(1, ids_TK)
    gates_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    return gates_TK / gates_TK.sum(-1, keepdim=True) if renormalize else gates_TK


def sigmoid(x: Tensor) -> Tensor:
    return registry.call("pointwise", torch.sigmoid, x)


def sigmoid_shares(logits: Tensor) -> Tensor:
    """s / Σ s of s = sigmoid(logits): through logarithms, so that scores which round to zero still sum to one."""
    return registry.call("pointwise", F.logsigmoid, logits).softmax(-1)


def top_k_lowest_index(scores_TE: Tensor, top_k: int) -> Tensor:
    """The ids of the k highest scores, best first, ties to the lower index: int64 [T, k]."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


@torch.no_grad()
def within_best_groups(rank_TE: Tensor, groups: int, top_groups: int, best: int) -> Tensor:
    """`rank_TE`, −inf outside of each token's `top_groups` groups; ties to the lower group.

    A group's score is the sum of its `best` highest ranks: 1 in DeepSeek-V2 (its maximum), 2 in DeepSeek-V3. Outside is
    −inf. Code that fills in 0 (DeepSeek's first V3 release, Hugging Face's V2) lets an expert outside win over negative
    biased scores, and tie with softmax scores that round to 0; nowhere else can the two be told apart.
    """
    if top_groups == groups:
        return rank_TE
    rank_TGe = rank_TE.unflatten(-1, (groups, rank_TE.shape[-1] // groups))
    score_TG = rank_TGe.topk(best, dim=-1).values.sum(-1)
    outside_TG = torch.ones_like(score_TG, dtype=torch.bool)
    outside_TG.scatter_(1, top_k_lowest_index(score_TG, top_groups), False)
    return rank_TGe.masked_fill(outside_TG[..., None], -torch.inf).flatten(1)
