"""Root-mean-square normalisation (Zhang & Sennrich 1910.07467 eq. 4)."""

import torch
from torch import Tensor, nn

from ...kernels import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)

    def after(self, x_TD: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        """A residual sum and its norm: (x + y, norm(x + y))."""
        return add_rms_norm(x_TD, y_TD, self.weight, self.eps)
