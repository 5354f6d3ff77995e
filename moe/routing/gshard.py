"""GShard top-2 routing (Lepikhin et al. 2006.16668, Algorithm 1).

The two gates are normalised to sum to one BEFORE any drop and not again after. The second expert is dispatched with
probability min(1, 2·g2) in training, always in evaluation.
"""

import torch
from torch import Tensor

from ...kernels.random import ROUTE_SECOND
from .record import RouteContext
from .router import Router, top_k_lowest_index


class GShardRouter(Router):
    """Two experts a token, the second at random in proportion to its gate (`second_policy="all"`: always)."""

    def choose(self, probs_TE: Tensor, logits_TE: Tensor, context: RouteContext) -> tuple[Tensor, Tensor, Tensor]:
        ids_T2 = top_k_lowest_index(logits_TE, 2)
        gates_T2 = probs_TE.gather(1, ids_T2)
        gates_T2 = gates_T2 / gates_T2.sum(-1, keepdim=True)
        wanted_T2 = torch.ones_like(ids_T2, dtype=torch.bool)
        if self.training and self.cfg.second_policy == "random":
            draw_T = self.draw(len(ids_T2), context, ROUTE_SECOND, 1, ids_T2.device)[:, 0]
            wanted_T2[:, 1] = 2 * gates_T2[:, 1].detach() > draw_T
        return ids_T2, gates_T2, wanted_T2
