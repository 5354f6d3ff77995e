"""Dense mixture (Jacobs et al. 1991): every token goes to every expert, weighted by softmax(x · Wᵀ).

T tokens, E experts.
"""

import torch
from torch import Tensor

from .record import RouteContext
from .router import Router, Scores


class DenseRouter(Router):
    """y = Σ_i p_i · E_i(x) over all E experts, in the order of their ids; the yardstick of every sparse router."""

    dropless = True
    needs_loss = False

    def select(self, scores: Scores, context: RouteContext) -> tuple[Tensor, Tensor]:
        ids_TE = torch.arange(self.cfg.num_experts, device=scores.rank.device).repeat(len(scores.rank), 1)
        return ids_TE, torch.ones_like(ids_TE, dtype=torch.bool)
