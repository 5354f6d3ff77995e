"""Feed-forward networks and their activations, shared by the dense slot, shared experts and the expert stack.

T tokens, D width, F hidden width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import pointwise, swiglu
from .linear import Linear


def swiglu_clamped(gate_up_N2F: Tensor) -> Tensor:
    """(up + 1) · gate · sigmoid(1.702 · gate), gate at most 7 and up within ± 7 (GPT-OSS 2508.10925)."""
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * pointwise(torch.sigmoid, 1.702 * gate)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "relu": F.relu,
    "gelu": partial(pointwise, F.gelu),
    "swiglu_clamped": swiglu_clamped,
}


def hidden_rows(activation: str, hidden: int) -> int:
    """Rows of the input projection: gate and up for SwiGLU (Shazeer 2002.05202), one row a hidden unit otherwise."""
    return 2 * hidden if activation.startswith("swiglu") else hidden


class FeedForward(nn.Module):
    """y = W_out · act(W_in · x), no bias."""

    def __init__(self, width: int, hidden: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.w_in = Linear(width, hidden_rows(activation, hidden), bias=False)
        self.w_out = Linear(hidden, width, bias=False)
        self.act = ACTIVATIONS[activation]

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w_out(self.act(self.w_in(x_TD)))
