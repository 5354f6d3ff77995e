"""GShard top-2 routing (Lepikhin et al. 2006.16668, Algorithm 1) and its variants.

The two gates g1' = g1 / (g1 + g2), g2' = g2 / (g1 + g2) are normalised BEFORE any drop and not again after; where both
choices are dropped, the residual alone is left. The variants are Mesh TensorFlow's and DeepSpeed's.

T tokens, E experts; of a pair, 0 is the first choice and 1 the second.
"""

import torch
from torch import Tensor

from ...kernels.random import ROUTE_SECOND
from .record import RouteContext
from .router import Router, Scores


class GShardRouter(Router):
    """Two experts a token. When the second is wanted, `second_policy` says:

    random     in training with probability min(1, g2' / second_threshold), always in evaluation (GShard: 0.5)
    threshold  where g2' > second_threshold (Mesh TensorFlow); as g2' is at most 0.5, never from 0.5 on
    all, none  always, never
    gumbel     always; in training it is drawn among the others in proportion to their probabilities (DeepSpeed)

    `renormalize_kept` divides by the sum of the kept gates after dropping instead (DeepSpeed).
    """

    def select(self, scores: Scores, context: RouteContext) -> tuple[Tensor, Tensor]:
        ids_T2, wanted_T2 = super().select(scores, context)
        policy, threshold = self.cfg.second_policy, self.cfg.second_threshold
        if policy == "gumbel" and self.training:
            ids_T2[:, 1] = self.sample_second(scores.logits, ids_T2[:, :1], context)
        second_T = self.weigh(scores, ids_T2, wanted_T2)[:, 1]
        if policy == "random" and self.training:
            draw_T1 = self.draw(len(ids_T2), context, ROUTE_SECOND, 1, ids_T2.device)
            wanted_T2[:, 1] = second_T / threshold > draw_T1[:, 0]
        elif policy == "threshold":
            wanted_T2[:, 1] = second_T > threshold
        elif policy == "none":
            wanted_T2[:, 1] = False
        return ids_T2, wanted_T2

    def sample_second(self, logits_TE: Tensor, first_T1: Tensor, context: RouteContext) -> Tensor:
        """An expert other than the first, in proportion to the probabilities: argmax of logits + Gumbel noise."""
        tokens, experts = logits_TE.shape
        draw_TE = self.draw(tokens, context, ROUTE_SECOND, experts, logits_TE.device)
        gumbel_TE = -torch.log(-torch.log1p(-draw_TE.clamp(min=2.0**-25)))  # a draw of 0 stands for [0, 2⁻²⁴)
        return (logits_TE + gumbel_TE).scatter(1, first_T1, float("-inf")).argmax(-1)

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """g / (g1 + g2), which is the softmax over the two logits: it can not divide by zero."""
        logits_T2 = scores.logits.gather(1, ids_TK)
        if not self.cfg.renormalize_kept:
            return logits_T2.softmax(-1)
        lowest = torch.finfo(logits_T2.dtype).min
        return logits_T2.masked_fill(~kept_TK, lowest).softmax(-1) * kept_TK
