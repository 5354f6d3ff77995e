"""Weights of eight or four bits, symmetric, and how they are made.

E experts, F output width, D input width, g numbers that share a scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ConfigError

BLOCK = 64  # numbers whose four-bit halves share bytes: byte j of a block holds number j low and number j + 32 high


@dataclass(frozen=True)
class QuantizedWeight:
    """w ≈ scale · q, rows over the input width.

    Attributes:
        q: int8 [..., F, D] within ±127; for four bits uint8 [..., F, D / 2] of q + 8, two numbers a byte.
        scale: float32 [..., F]; for four bits [..., F, D / g].
        sums: int32 [..., F], Σ_d q of eight bits: what rows that are raised by 128 give too much; empty for four bits.
        bits: 8 or 4.
    """

    q: Tensor
    scale: Tensor
    sums: Tensor
    bits: int

    @property
    def depth(self) -> int:
        """D."""
        return self.q.shape[-1] * (8 // self.bits)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale · q, [..., F, D]."""
        if self.bits == 8:
            return (self.q.float() * self.scale[..., None]).to(dtype)
        bytes_ = self.q.unflatten(-1, (-1, BLOCK // 2))
        q = (torch.cat((bytes_ & 15, bytes_ >> 4), -1).float() - 8).flatten(-2)
        groups = self.scale.shape[-1]
        return (q.unflatten(-1, (groups, -1)) * self.scale[..., None]).flatten(-2).to(dtype)


def quantize_weight(w_FD: Tensor, bits: int = 8, group: int = 64, clip: float = 1.0) -> QuantizedWeight:
    """Round a matrix, or a stack of them, to nearest: scale = clip · max |w| / most, values beyond are clipped.

    Args:
        w_FD: [..., F, D], any floating dtype and strides; a row's maximum is over D, of four bits over each group.
        bits: 8 (within ±127) or 4 (within ±7).
        group: numbers along D that share a scale; four bits only.
        clip: share of the largest magnitude that is kept.

    Raises:
        ConfigError: bits, group or clip out of range, or a width that groups do not divide.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits ({bits}) must be 4 or 8")
    if not 0 < clip <= 1:
        raise ConfigError(f"clip ({clip}) must be above 0 and at most 1: use 1 to clip nothing")
    w = w_FD.float()
    if bits == 8:
        scale = w.abs().amax(-1) * (clip / 127)
        q = _rounded(w, scale[..., None], 127).to(torch.int8)
        return QuantizedWeight(q.contiguous(), scale, q.sum(-1, dtype=torch.int32), 8)
    depth = w.shape[-1]
    if group < BLOCK or group % BLOCK or depth % group:
        rule = f"must be a multiple of {BLOCK} that divides the width ({depth})"
        raise ConfigError(f"group ({group}) {rule}: use {BLOCK}, or 8 bits where the width is no multiple of it")
    w = w.unflatten(-1, (-1, group))
    scale = w.abs().amax(-1) * (clip / 7)
    q = (_rounded(w, scale[..., None], 7) + 8).to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2, BLOCK // 2))
    packed = (q[..., 0, :] | q[..., 1, :] << 4).flatten(-2).contiguous()
    return QuantizedWeight(packed, scale.contiguous(), scale.new_empty(0, dtype=torch.int32), 4)


def quantize_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers within ±127, float32 [T, D], and their scales [T]: NaN for a row that is not finite."""
    x = x_TD.float()
    most_T = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(len(x))
    turn_T = torch.where(most_T > 0, 127 / most_T, 0.0)
    finite_T = most_T.isfinite()
    q = torch.where(finite_T[:, None], (x * turn_T[:, None]).round(), 0.0)
    return q, torch.where(finite_T, most_T / 127, torch.nan)


def _rounded(w: Tensor, scale: Tensor, most: int) -> Tensor:
    return torch.where(scale > 0, w / scale, 0.0).round().clamp(-most, most)
