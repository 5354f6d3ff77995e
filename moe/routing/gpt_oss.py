"""GPT-OSS (2508.10925): a linear map with bias, the k highest logits, a softmax over those k.

T tokens, D width, E experts, K choices.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import linear
from .router import Router, Scores


class GptOssRouter(Router):
    """weights = softmax over the k kept of x · Wᵀ + b.

    Attributes:
        bias: float32 [E], trained by gradient, starts at zero.
    """

    bias: nn.Parameter

    def build(self) -> None:
        super().build()
        self.bias = nn.Parameter(torch.empty(self.cfg.num_experts, dtype=torch.float32))

    def variance(self, name: str) -> float:
        return 0.0 if name == "bias" else super().variance(name)

    def logits(self, x_TD: Tensor) -> Tensor:
        """x · Wᵀ + b."""
        return linear(x_TD, self.weight.to(x_TD.dtype), self.bias.to(x_TD.dtype))

    def weigh(self, scores: Scores, ids_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return scores.logits.gather(1, ids_TK).softmax(-1)

    def rule(self) -> Mapping[str, Any]:
        return {"score": "chosen"}
