"""Cross entropy by the fused library call.

T tokens, V vocabulary.
"""

import torch
from torch import Tensor

from ..reference.precision import wide

IGNORED = -100


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    targets = targets_T.masked_fill(targets_T < 0, IGNORED)
    return torch.nn.functional.cross_entropy(wide(logits_TV), targets, ignore_index=IGNORED, reduction="none")
