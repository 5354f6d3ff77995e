"""Noisy top-k gating (Shazeer et al. 1701.06538 eq. 3–5).

H = x · Wᵀ + N(0, 1) · softplus(x · W_noiseᵀ), in training only; the k largest are kept; G = softmax over those k.

T tokens, D width, E experts, K choices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import linear, normal
from ...kernels.random import ROUTE_NOISE
from .record import RouteContext
from .router import Router, Scores


class NoisyTopKRouter(Router):
    """Learned noise spreads tokens over experts; softmax AFTER top-k, so the k weights sum to one.

    Both weights start at zero (appendix A): the first choices are pure noise of deviation softplus(0) = ln 2, alike
    for all experts.

    Probabilities (balance loss, entropy) are the softmax of the logits without noise: what the router believes, not
    what it tries, so that they mean the same in training and in evaluation.

    Attributes:
        noise_weight: float32 [E, D], W_noise.
    """

    noise_weight: nn.Parameter

    def build(self) -> None:
        super().build()
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    def variance(self, name: str) -> float:
        return 0.0

    def score(self, x_TD: Tensor, context: RouteContext) -> Scores:
        logits_TE = self.logits(x_TD)
        rank_TE, noise_TE = logits_TE, None
        if self.training:
            noise_TE = F.softplus(linear(x_TD, self.noise_weight.to(x_TD.dtype)))
            tokens, experts = logits_TE.shape
            draw_TE = self.draw(tokens, context, ROUTE_NOISE, experts, x_TD.device, source=normal)
            rank_TE = logits_TE + draw_TE.to(x_TD.dtype) * noise_TE
        return Scores(
            logits=logits_TE, probs=logits_TE.softmax(-1), rank=rank_TE, gates=rank_TE.softmax(-1), noise=noise_TE
        )

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return scores.rank.gather(1, ids_TK).softmax(-1)
