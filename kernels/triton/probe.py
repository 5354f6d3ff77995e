"""What every Triton form asks before it runs."""

import torch
from torch import Tensor

from . import interpreter

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor) -> bool:
    """On a GPU, or interpreted by the corrected interpreter; no float64."""
    return (x.is_cuda or interpreter.active()) and x.dtype in FLOATS
