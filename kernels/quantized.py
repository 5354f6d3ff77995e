"""Weights of eight or four bits, and how they are made.

E experts, F output width, D input width, G groups of numbers that share a scale.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import ConfigError

BLOCK = 64  # numbers whose four-bit halves share bytes: byte j of a block holds number j low and number j + 32 high
FLOAT = torch.float8_e4m3fn
TINY = torch.finfo(torch.float32).tiny
LEAST = 1e-30
"""A row of which no number is larger is a row of zeros: 127 over it would be no number."""
LONGEST = 1 << 17
"""Numbers whose products with a row's digits 32 bits can sum."""
Kind = Literal["int", "float"]
Rows = Literal["float", "int8"]


@dataclass(frozen=True)
class QuantizedWeight:
    """w ≈ scale · (q - zero), rows over the input width.

    Attributes:
        q: int8 [..., F, D]; float8_e4m3fn, no NaN among it, where it is no whole number; for four bits uint8
            [..., F, D / 2] of q + 8, two numbers a byte. All three are contiguous, as the kernels read them.
        scale: float32 [..., F], or [..., F, G] of groups.
        zero: float32 of scale's shape; empty where the numbers are symmetric, within ±127 or ±7.
        bits: 8 or 4.
        rows: how rows that meet it are taken: `float`, as they are, or `int8`, rounded as they come (W8A8).
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    rows: Rows = "float"

    @property
    def kind(self) -> Kind:
        """Whether q are whole numbers."""
        return "float" if self.q.dtype == FLOAT else "int"

    @property
    def depth(self) -> int:
        """D."""
        return self.q.shape[-1] * (8 // self.bits)

    @property
    def groups(self) -> int:
        """G: 1 where a whole row has one scale."""
        return self.scale.shape[-1] if self.scale.ndim == self.q.ndim else 1

    def __getitem__(self, index: int | slice | Tensor) -> "QuantizedWeight":
        """Of a stack a matrix, of a matrix rows."""
        q, scale = self.q[index].contiguous(), self.scale[index].contiguous()
        zero = self.zero[index].contiguous() if self.zero.numel() else self.zero
        return QuantizedWeight(q, scale, zero, self.bits, self.rows)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale · (q - zero), [..., F, D]."""
        q = (self.q.float() if self.bits == 8 else _unpacked(self.q)).unflatten(-1, (self.groups, -1))
        scale = self.scale.reshape(*q.shape[:-1], 1)
        zero = self.zero.reshape(*q.shape[:-1], 1) if self.zero.numel() else 0.0
        return ((q - zero) * scale).flatten(-2).to(dtype)


def quantize_weight(
    w_FD: Tensor,
    bits: int = 8,
    group: int | None = None,
    clip: float | Tensor = 1.0,
    *,
    zero: bool = False,
    kind: Kind = "int",
    rows: Rows = "float",
) -> QuantizedWeight:
    """Round a matrix, or a stack of them, to nearest; arguments and errors as of `find_scale` and `encode`."""
    scale, zeros = find_scale(w_FD, bits, group, clip, zero=zero, kind=kind)
    return encode(w_FD, scale, zeros, bits, kind=kind, rows=rows)


def find_scale(
    w_FD: Tensor,
    bits: int = 8,
    group: int | None = None,
    clip: float | Tensor = 1.0,
    *,
    zero: bool = False,
    kind: Kind = "int",
) -> tuple[Tensor, Tensor]:
    """The scale and zero point with which numbers just reach from one end to the other.

    Symmetric: scale = clip · max |w| / most, with most 127, 7 or e4m3's 448. With a zero point: from clip · min(w, 0)
    to clip · max(w, 0), and zero is a whole number, so that a weight of 0 stays 0. Values beyond are clipped. What
    would need a subnormal scale, which is too coarse to reach that far, becomes zero.

    Args:
        w_FD: [..., F, D], any floating dtype and strides.
        bits: 8 or 4.
        group: numbers along D that share a scale, a multiple of 64; None = a whole row of eight bits, 64 of four.
        clip: share of the range that is kept: a number, or a tensor of the scale's shape.
        zero: whether there are zero points.
        kind: whole numbers, or `float`, e4m3: symmetric, of eight bits, a scale a row.

    Returns:
        scale and zero of `QuantizedWeight`.

    Raises:
        ConfigError: a value out of range, what does not go together, a width that groups do not divide, or a weight
            that is not finite.
    """
    _check(bits, kind, zero)
    if kind == "float" and group is not None:
        raise ConfigError(f"group ({group}) must be None for e4m3: leave it out")
    clips = torch.as_tensor(clip)
    wrong = clips[~((clips > 0) & (clips <= 1))]
    if len(wrong):
        raise ConfigError(f"clip ({wrong[0]:g}) must be above 0 and at most 1: use 1 to clip nothing")
    w = _grouped(w_FD.float(), bits, group)
    if zero:
        low, high = w.amin(-1).clamp_max(0) * clip, w.amax(-1).clamp_min(0) * clip
        scale = _normal((high - low) / (2**bits - 1))
        return scale, -(2.0 ** (bits - 1)) - torch.where(scale > 0, low / scale, 0.0).round()
    most = torch.finfo(FLOAT).max if kind == "float" else 2 ** (bits - 1) - 1
    scale = _normal(w.abs().amax(-1) * clip / most)
    return scale, scale.new_empty(0)


def encode(
    w_FD: Tensor, scale: Tensor, zero: Tensor | None = None, bits: int = 8, *, kind: Kind = "int", rows: Rows = "float"
) -> QuantizedWeight:
    """Round to nearest with scales from outside: q = round(w / scale + zero), clipped to what the bits hold.

    Args:
        w_FD: [..., F, D].
        scale: [..., F], or [..., F, G]; 0 stands for a row or group of zeros.
        zero: of scale's shape; None or empty = symmetric.
        bits, kind, rows: as of `QuantizedWeight`.

    Raises:
        ConfigError: a scale that is not finite (so is one that `find_scale` has found in weights that are not), what
            does not go together, or groups or widths that the kernels do not have.
    """
    zero = scale.new_empty(0) if zero is None else zero
    asymmetric = zero.numel() > 0
    _check(bits, kind, asymmetric)
    if kind == "float" and rows != "float":
        raise ConfigError(f"rows ({rows}) must be float for e4m3, which meets rows as they are: use kind=int")
    if not scale.isfinite().all():
        raise ConfigError(f"scale ({scale.amax():g}) must be finite: look for NaN and infinities in the weights")
    depth, groups = w_FD.shape[-1], scale.shape[-1] if scale.ndim == w_FD.ndim else 1
    if scale.ndim == w_FD.ndim or bits == 4:
        _check_group(depth / groups, depth)
    if kind == "int" and depth / groups > LONGEST:
        rule = f"must be at most {LONGEST} for one scale, whose products are summed in 32 bits"
        raise ConfigError(f"width ({depth / groups:g}) {rule}: use group={BLOCK}")
    scale, zero = scale.contiguous(), zero.contiguous()
    w = w_FD.float().contiguous().unflatten(-1, (groups, -1))
    per = (*w.shape[:-1], 1)
    q = nearest(w, scale.reshape(per), zero.reshape(per) if asymmetric else None, bits, kind).flatten(-2)
    stored = q.to(FLOAT) if kind == "float" else q.to(torch.int8) if bits == 8 else _packed(q)
    return QuantizedWeight(stored, scale, zero, bits, rows)


def nearest(w: Tensor, scale: Tensor, zero: Tensor | None = None, bits: int = 8, kind: Kind = "int") -> Tensor:
    """The q nearest to w / scale + zero, as numbers of w's dtype; zero where the scale is 0. Shapes broadcast."""
    q = torch.where(scale > 0, w / scale, 0.0)
    if kind == "float":
        most = torch.finfo(FLOAT).max
        return q.clamp_(-most, most).to(FLOAT).to(w.dtype)
    if zero is not None:
        q += zero
    half = 2 ** (bits - 1)
    return q.round_().clamp_(1 - half if zero is None else -half, half - 1)


def quantize_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., D] as whole numbers within ±127, float32, and their scales: NaN for a row that is not finite."""
    x = x_TD.float()
    most_T = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    turn_T = torch.where(most_T > LEAST, 127 / most_T, 0.0)
    finite_T = most_T.isfinite()
    q = torch.where(finite_T[..., None], (x * turn_T[..., None]).round(), 0.0)
    return q, torch.where(finite_T, most_T / 127, torch.nan)


def _check(bits: int, kind: Kind, zero: bool) -> None:
    if bits not in (4, 8):
        raise ConfigError(f"bits ({bits}) must be 4 or 8: use 8")
    if kind == "float" and (bits != 8 or zero):
        raise ConfigError(f"kind (float) goes with 8 bits ({bits}) and no zero points: use kind=int")


def _check_group(group: float, depth: int) -> None:
    if group < BLOCK or group % BLOCK or depth % group:
        rule = f"must be a multiple of {BLOCK} that divides the width ({depth})"
        raise ConfigError(f"group ({group:g}) {rule}: use {BLOCK}, or 8 bits where the width is no multiple of it")


def _normal(scale: Tensor) -> Tensor:
    return torch.where(scale < TINY, 0.0, scale)


def _grouped(w: Tensor, bits: int, group: int | None) -> Tensor:
    """[..., F, G, g], or [..., F, D] where a row has one scale."""
    if bits == 8 and group is None:
        return w
    group = BLOCK if group is None else group
    _check_group(group, w.shape[-1])
    return w.unflatten(-1, (-1, group))


def _packed(q: Tensor) -> Tensor:
    """Whole numbers from -8 to 7, two a byte."""
    halves = (q + 8).to(torch.uint8).unflatten(-1, (-1, 2, BLOCK // 2))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def _unpacked(q: Tensor) -> Tensor:
    """Float32 of what `_packed` gave."""
    halves = q.unflatten(-1, (-1, BLOCK // 2))
    return (torch.cat((halves & 15, halves >> 4), -1).float() - 8).flatten(-2)
