"""DeepSeek-V2 (2405.04434 §2.2.1–2.2.2): softmax scores, top-k within the groups whose best expert scores highest.

T tokens, E experts, K choices.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...kernels.reference.gates import within_best_groups
from .record import RouteContext
from .router import Scores
from .topk_softmax import TopKSoftmaxRouter


class DeepSeekV2Router(TopKSoftmaxRouter):
    """weights = route_scale · p_i, or route_scale · p_i / Σ_chosen p with `renormalize`.

    Sources disagree on the two together: DeepSeek's published V2 code either renormalises or scales, Hugging Face's
    (transformers 5) always scales and never renormalises. Every released V2 has norm_topk_prob false, where all agree;
    with it true this router does both, as DeepSeek-V3 does: route_scale = 1 gives DeepSeek's V2 code.

    Experts are ranked by logit, which orders them as the softmax does but keeps apart what it rounds to zero.
    """

    def score(self, x_TD: Tensor, context: RouteContext) -> Scores:
        scores = super().score(x_TD, context)
        rank_TE = within_best_groups(scores.rank, self.cfg.expert_groups, self.cfg.top_groups, best=1)
        return replace(scores, rank=rank_TE)

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return self.cfg.route_scale * super().weigh(scores, ids_TK, kept_TK)

    def rule(self) -> Mapping[str, Any]:
        cfg = self.cfg
        return {**super().rule(), "groups": cfg.expert_groups, "top_groups": cfg.top_groups, "scale": cfg.route_scale}
