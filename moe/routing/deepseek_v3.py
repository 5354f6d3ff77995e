"""DeepSeek-V3 (2412.19437 eq. 13–16): sigmoid scores, selection by score + loss-free bias (2408.15664), group-limited.

T tokens, E experts, K choices.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels import pointwise
from ...kernels.reference.gates import sigmoid_shares, within_best_groups
from .record import RouteContext
from .router import Router, Scores


class DeepSeekV3Router(Router):
    """s = sigmoid(x · Wᵀ); the k highest s + b, within the groups whose best two s + b sum highest.

    weights = route_scale · s_i / Σ_chosen s, without the division unless `renormalize`. The bias decides who is
    chosen and never touches a weight, so it carries no gradient. Probabilities are s / Σ_j s_j (eq. 19).

    Attributes:
        balance_bias: float32 [E] buffer b, starts at zero; `bias.update_bias` moves it once an optimizer step.
    """

    needs_loss = False

    balance_bias: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("balance_bias", torch.empty(self.cfg.num_experts, dtype=torch.float32))

    def score(self, x_TD: Tensor, context: RouteContext) -> Scores:
        logits_TE = self.logits(x_TD)
        gates_TE = pointwise(torch.sigmoid, logits_TE)
        biased_TE = gates_TE.detach() + self.balance_bias.to(x_TD.dtype)
        rank_TE = within_best_groups(biased_TE, self.cfg.expert_groups, self.cfg.top_groups, best=2)
        return Scores(logits=logits_TE, probs=sigmoid_shares(logits_TE), rank=rank_TE, gates=gates_TE)

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        if self.cfg.renormalize:
            return self.cfg.route_scale * sigmoid_shares(scores.logits.gather(1, ids_TK))
        return self.cfg.route_scale * scores.gates.gather(1, ids_TK)

    def rule(self) -> Mapping[str, Any]:
        cfg = self.cfg
        return {
            "score": "sigmoid", "bias_E": self.balance_bias, "groups": cfg.expert_groups,
            "top_groups": cfg.top_groups, "best": 2, "renormalize": cfg.renormalize, "scale": cfg.route_scale,
        }  # fmt: skip
