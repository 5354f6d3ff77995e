"""Zeros and rounding in one pass: the weights that stay make up for both (SparseGPT, 2301.00774 §3.5).

F output width, D input width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.quantized import QuantizedWeight, encode, nearest
from ..quantization_config import QuantizationConfig
from .clipping import MAXIMUM, ScaleRule, fit_scale
from .pruning import Pruned, energy, prune
from .rounding import round_weight
from .seen import Seen
from .sparsegpt import DAMP
from .sparsity import Sparsity


class Grid:
    """What columns are stored as, whose scales are found on the way: a group's when its first column comes, a row's
    (and a matrix') before all.

    Args:
        cfg: how the matrix is stored.
        rule: how scales are found.
        seen: weighs errors for `rule.clip=mse`.
    """

    def __init__(self, cfg: QuantizationConfig, rule: ScaleRule, seen: Seen) -> None:
        self._cfg, self._rule, self._square_D = cfg, rule, seen.square_D
        depth = len(seen.square_D)
        self._span = depth if cfg.group is None or rule.whole else cfg.group
        self._found: list[tuple[Tensor, Tensor]] = []

    def rounded(self, w_FD: Tensor, at: int) -> Tensor:
        """Column `at`, [F], of the matrix as it is now; columns come in their order."""
        if at % self._span == 0:
            own = slice(at, at + self._span)
            self._found.append(fit_scale(w_FD[:, own], self._cfg, self._rule, self._square_D[own]))
        scale_F, zero_F = (self._of_column(value) if value.numel() else None for value in self._found[-1])
        assert scale_F is not None
        q_F = nearest(w_FD[:, at], scale_F, zero_F, self._cfg.bits, self._cfg.kind)
        return (q_F if zero_F is None else q_F - zero_F) * scale_F

    def encoded(self, w_FD: Tensor) -> QuantizedWeight:
        """All columns, each as `rounded` gave it, or zero."""
        scale, zero = (torch.cat(parts, -1) for parts in zip(*self._found, strict=True))
        return encode(w_FD, scale, zero, self._cfg.bits, kind=self._cfg.kind, rows=self._cfg.rows)

    def _of_column(self, value: Tensor) -> Tensor:
        return value if self._cfg.group is None else value[:, 0]  # groups that come together share one


def prune_and_round(
    w_FD: Tensor,
    seen: Seen,
    sparsity: Sparsity,
    cfg: QuantizationConfig,
    rule: ScaleRule = MAXIMUM,
    *,
    name: str,
    min_rows: int = 1,
    damp: float = DAMP,
) -> tuple[QuantizedWeight, Pruned]:
    """A matrix with zeros whose other weights are rounded, near the least Σ ‖(W - Ŵ) x‖² over the rows that were seen.

    Column by column: SparseGPT chooses the zeros, what stays is rounded, and the columns to come make up for both.
    Where calibration can not decide, magnitudes choose and the rest is rounded to nearest.

    Args:
        w_FD: any floating dtype.
        seen: with its Gram matrix.
        sparsity: which share goes.
        cfg: how what stays is stored.
        rule: how scales are found.
        name: the matrix'.
        min_rows: fewer say too little.
        damp: share of the mean diagonal that is added to the Hessian.

    Raises:
        NonFiniteError: NaN or infinity in the weights or in what was seen.
        ConfigError: a span or groups that do not divide D.
    """
    grid = Grid(cfg, rule, seen)
    whole_FD = w_FD.to(torch.promote_types(w_FD.dtype, torch.float32))
    new_FD, made = prune(
        whole_FD, seen, sparsity, "sparsegpt", name=name, min_rows=min_rows, damp=damp, rounded=grid.rounded
    )
    stored = grid.encoded(new_FD) if made.fallback is None else round_weight(new_FD, cfg, rule, name=name)
    found_FD = stored.dequantized()
    share = float((found_FD == 0).double().mean())
    return stored, replace(made, sparsity=share, error=energy(whole_FD - found_FD, seen))
