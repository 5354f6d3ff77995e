"""What happens to single numbers or single rows.

T tokens, D width, H heads, d head dim, h = d / 2, N rows, F hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import dense

LANES = 64
"""No CPU's vectors, unrolled as PyTorch unrolls them, are longer; a multiple leaves no remainder."""
PIECE = 2048
"""Numbers that PyTorch never divides over threads."""


def pointwise(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % LANES))
    return torch.cat([f(piece) for piece in flat.split(PIECE)])[: x.numel()].view(x.shape)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return pointwise(torch.nn.functional.silu, gate) * up


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    rows = [dense.rms_norm(x_1D, weight_D, eps) for x_1D in x_TD.contiguous().view(-1, 1, x_TD.shape[-1])]
    return torch.cat(rows).view(x_TD.shape) if rows else x_TD * weight_D


def rope(x_THd: Tensor, positions_T: Tensor, turns_h: Tensor, magnitude: float = 1.0) -> Tensor:
    angles_Th = positions_T[:, None] * turns_h
    return dense.rotate(x_THd, *(pointwise(f, angles_Th) * magnitude for f in (torch.cos, torch.sin)))
