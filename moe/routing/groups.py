"""Group-limited routing (DeepSeek-V2 2405.04434 §2.2.2): a token may use the experts of its best groups only.

T tokens, E experts, G groups of e neighbouring experts.
"""

import torch
from torch import Tensor

from .router import top_k_lowest_index


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
