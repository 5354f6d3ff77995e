"""GShard top-2 routing (Lepikhin et al. 2006.16668, Algorithm 1).

The two gates are normalised to sum to one BEFORE any drop and not again after. The second expert is dispatched with
probability min(1, 2·g2) in training, always in evaluation.
"""

from torch import Tensor

from ...kernels.random import ROUTE_SECOND
from .record import RouteContext
from .router import Router, Scores


class GShardRouter(Router):
    """Two experts a token, the second at random in proportion to its gate (`second_policy="all"`: always)."""

    def select(self, scores: Scores, context: RouteContext) -> tuple[Tensor, Tensor]:
        ids_T2, wanted_T2 = super().select(scores, context)
        if self.training and self.cfg.second_policy == "random":
            gates_T2 = self.weigh(scores, ids_T2, wanted_T2)
            wanted_T2[:, 1] = 2 * gates_T2[:, 1] > self.draw(len(ids_T2), context, ROUTE_SECOND, 1, ids_T2.device)[:, 0]
        return ids_T2, wanted_T2

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        gates_T2 = scores.gates.gather(1, ids_TK)
        return gates_T2 / gates_T2.sum(-1, keepdim=True)
