"""Relative positions by learned biases (T5 1910.10683 §2.1): one for every head and bucket of distances.

Near distances have a bucket each, farther ones share ever wider buckets, and all from `max_distance` on share the last.
H heads, R = 2 · max_distance + 1 distances.
"""

import math

import torch
from torch import Tensor, nn

from ..config import ModelConfig


class RelativeBias(nn.Module):
    """The biases of one stack of blocks; its layers share them.

    Attributes:
        weight: [buckets, H].
    """

    def __init__(self, cfg: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.buckets, self.longest, self.causal = cfg.attention.buckets, cfg.attention.max_distance, causal
        self.weight = nn.Parameter(torch.zeros(self.buckets, cfg.heads))

    def forward(self) -> Tensor:
        """bias_HR for the distances (key - query) from -max_distance to max_distance."""
        ahead_R = torch.arange(-self.longest, self.longest + 1, device=self.weight.device)
        return self.weight[self.bucket(ahead_R)].T

    def bucket(self, ahead: Tensor) -> Tensor:
        """int64 bucket of each distance (key position - query position)."""
        if self.causal:
            return self._sized((-ahead).clamp_min(0), self.buckets)
        half = self.buckets // 2
        return self._sized(ahead.abs(), half) + half * (ahead > 0)

    def _sized(self, distance: Tensor, buckets: int) -> Tensor:
        exact = buckets // 2
        wide = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.longest / exact)
        far = (exact + (wide * (buckets - exact)).long()).clamp_max(buckets - 1)
        return torch.where(distance < exact, distance, far)
