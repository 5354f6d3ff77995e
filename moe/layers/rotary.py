"""Rotary frequencies (Su et al. 2104.09864), as they are or stretched (`RopeConfig`). d numbers that turn."""

import math

import torch
from torch import Tensor

from ...kernels import pointwise, rotate
from ..config import ModelConfig, RopeConfig
from .context import Turns


class Rotary:
    """Rotates queries and keys of one layer by their positions; has no parameters.

    Args:
        cfg: the model.
        d: how many numbers of a head turn: its size, or `latent.rope_dim`.
    """

    def __init__(self, cfg: ModelConfig, d: int) -> None:
        self.theta, self.stretch, self.d = cfg.rope_theta, cfg.rope, d
        self.magnitude = magnitude(cfg.rope)

    def __call__(self, positions_T: Tensor, turns: Turns, *x_THd: Tensor) -> tuple[Tensor, ...]:
        """Each of `x_THd` rotated, in its own dtype."""
        cos_Th, sin_Th = self.angles(positions_T, turns, x_THd[0].dtype)
        return tuple(rotate(x, cos_Th, sin_Th) for x in x_THd)

    def angles(self, positions_T: Tensor, turns: Turns, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles, times the magnitude: float32 [T, d / 2] (float64 for float64).

        Found once for all layers that share `turns` and rotate alike.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        kind = self.theta, self.stretch, self.d, dtype
        found = turns.get(kind)
        if found is None or found[0] is not positions_T:
            angles_Th = positions_T[:, None] * frequencies(*kind, positions_T.device)
            cos_Th, sin_Th = (pointwise(f, angles_Th) for f in (torch.cos, torch.sin))
            if self.magnitude != 1:
                cos_Th, sin_Th = cos_Th * self.magnitude, sin_Th * self.magnitude
            found = turns[kind] = positions_T, cos_Th, sin_Th
        return found[1], found[2]


def frequencies(
    theta: float, stretch: RopeConfig | None, d: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Radians a position, [d / 2], fastest first."""
    at_h = torch.arange(0, d, 2, dtype=dtype, device=device)
    if stretch is None:
        return theta ** (-at_h / d)
    factor, length = stretch.factor, stretch.original_len
    if stretch.kind == "ntk":  # the slowest dimension is stretched whole, the fastest not at all
        return (theta * factor ** (d / (d - 2))) ** (-at_h / d)
    plain_h = theta ** (-at_h / d)
    if stretch.kind == "linear":
        return plain_h / factor
    if stretch.kind == "llama3":
        turns_h = length * plain_h / (2 * math.pi)
        keep_h = (turns_h - stretch.low_freq_factor) / (stretch.high_freq_factor - stretch.low_freq_factor)
    else:
        keep_h = 1 - _ramp(theta, stretch, d, at_h)
    keep_h = keep_h.clamp(0, 1)
    return plain_h / factor * (1 - keep_h) + plain_h * keep_h


def magnitude(stretch: RopeConfig | None) -> float:
    """What queries and keys are multiplied by (YaRN 2309.00071 eq. 21-22); 1 for all other kinds."""
    if stretch is None or stretch.kind != "yarn":
        return 1.0
    return yarn_magnitude(stretch.factor) if stretch.magnitude is None else stretch.magnitude


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """0.1 · scale · ln(factor) + 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _ramp(theta: float, stretch: RopeConfig, d: int, at_h: Tensor) -> Tensor:
    """From 0 at the dimension that turns `beta_fast` times in the original length to 1 at `beta_slow` times."""

    def dimension(turns: float) -> float:
        return d * math.log(stretch.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(stretch.beta_fast), dimension(stretch.beta_slow)
    if stretch.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return (at_h / 2 - low) / max(high - low, 0.001)
