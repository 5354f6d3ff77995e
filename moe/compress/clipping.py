"""Which scale rounded numbers have: what is clipped costs little where the rest gets finer steps.

F output width, D input width, G groups of numbers that share a scale.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from ...kernels.quantized import find_scale, nearest
from ..quantization_config import QuantizationConfig

SHARES = tuple(0.95**i for i in range(45))  # of the range, 1 to 0.1, that a search tries
PIECE = 1 << 22
"""Numbers of a matrix that a search looks at at once."""


@dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """How scales are found.

    Args:
        clip: the largest number that is kept: the maximum, a percentile of |w|, or where Σ (w - ŵ)² is least.
        percentile: of `clip=percentile`, in (0, 100].
        whole: one scale for the whole matrix.
    """

    clip: Literal["max", "percentile", "mse"] = "max"
    percentile: float = 99.9
    whole: bool = False


MAXIMUM = ScaleRule()


def fit_scale(
    w_FD: Tensor, cfg: QuantizationConfig, rule: ScaleRule = MAXIMUM, square_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero of a `QuantizedWeight`, as `rule` says.

    Args:
        w_FD: finite.
        cfg: bits, groups, zero points.
        rule: what is clipped, and how much of the matrix shares a scale.
        square_D: weighs the squared errors of `clip=mse`: Σ x² of the input's channels.
    """
    if not rule.whole:
        return _find(w_FD, cfg, cfg.group, rule, square_D)
    rows, depth = w_FD.shape
    shape = (rows,) if cfg.group is None else (rows, depth // cfg.group)
    span = None if cfg.group is None else rows * depth
    found = _find(w_FD.reshape(1, -1), cfg, span, rule, None if square_D is None else square_D.repeat(rows))
    scale, zero = (value.flatten().expand(shape).contiguous() if value.numel() else value for value in found)
    return scale, zero


def _find(
    w_FD: Tensor, cfg: QuantizationConfig, group: int | None, rule: ScaleRule, square_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    share: Tensor | float = 1.0
    if rule.clip == "percentile":
        share = _percentile(w_FD, group, rule.percentile)
    elif rule.clip == "mse":
        rows = max(PIECE // max(w_FD.shape[1], 1), 1)
        share = torch.cat([_least_error(w_RD, cfg, group, square_D) for w_RD in w_FD.split(rows)])
    return find_scale(w_FD, cfg.bits, group, share, zero=cfg.zero, kind=cfg.kind)


def _percentile(w_FD: Tensor, group: int | None, percentile: float) -> Tensor:
    """The percentile (nearest rank) of |w| as a share of the maximum, [F] or [F, G]; 1 where it is 0."""
    size_FGg = _in_groups(w_FD, group).abs().float()
    rank = max(ceil(percentile / 100 * size_FGg.shape[-1]), 1)
    kept_FG, most_FG = size_FGg.kthvalue(rank, -1).values, size_FGg.amax(-1)
    share_FG = torch.where(kept_FG > 0, kept_FG / most_FG, 1.0)
    return share_FG[:, 0] if group is None else share_FG


def _least_error(w_FD: Tensor, cfg: QuantizationConfig, group: int | None, square_D: Tensor | None) -> Tensor:
    """The share, [F] or [F, G], with which Σ square · (w - ŵ)² is least; the largest of equals."""
    w_FGg = _in_groups(w_FD.float(), group)
    square_Gg = None if square_D is None else _in_groups(square_D[None].float(), group)
    least_FG = torch.full_like(w_FGg[..., 0], torch.inf)
    best_FG = torch.ones_like(least_FG)
    for share in SHARES:
        scale, zero = find_scale(w_FD, cfg.bits, group, share, zero=cfg.zero, kind=cfg.kind)
        scale_FG1 = scale.view(*least_FG.shape, 1)
        zero_FG1 = zero.view_as(scale_FG1) if cfg.zero else None
        q_FGg = nearest(w_FGg, scale_FG1, zero_FG1, cfg.bits, cfg.kind)
        off_FGg = (q_FGg if zero_FG1 is None else q_FGg - zero_FG1).mul_(scale_FG1).sub_(w_FGg).square_()
        error_FG = (off_FGg if square_Gg is None else off_FGg.mul_(square_Gg)).sum(-1)
        best_FG = torch.where(error_FG < least_FG, share, best_FG)
        least_FG = torch.minimum(error_FG, least_FG)
    return best_FG[:, 0] if group is None else best_FG


def _in_groups(w_FD: Tensor, group: int | None) -> Tensor:
    """[F, G, g]; one group where a row has one scale."""
    return w_FD.unflatten(-1, (-1, group or w_FD.shape[-1]))
