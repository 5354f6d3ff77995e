"""The dtype in which sums are taken."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x if x.dtype == torch.float64 else x.float()
