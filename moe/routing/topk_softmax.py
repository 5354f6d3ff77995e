"""Top-k of a softmax, renormalised (Mixtral 2401.04088 §2.1, Qwen3-MoE) or not (Qwen2-MoE, OLMoE 2409.02060).

T tokens, K choices.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .router import Router, Scores


class TopKSoftmaxRouter(Router):
    """The k largest of softmax(x · Wᵀ); `renormalize` (their `norm_topk_prob`) divides them by their sum.

    Renormalised it equals a softmax over the k kept logits, as Mixtral's paper writes it.
    """

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        gates_TK = scores.gates.gather(1, ids_TK)
        return gates_TK / gates_TK.sum(-1, keepdim=True) if self.cfg.renormalize else gates_TK

    def rule(self) -> Mapping[str, Any]:
        return {"renormalize": self.cfg.renormalize}
