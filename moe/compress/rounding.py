"""A matrix rounded to nearest, as it is stored. F output width, D input width."""

from torch import Tensor

from ... import NonFiniteError
from ...kernels.quantized import QuantizedWeight, encode
from ..quantization_config import QuantizationConfig
from .clipping import MAXIMUM, ScaleRule, fit_scale
from .seen import Seen


def round_weight(
    w_FD: Tensor, cfg: QuantizationConfig, rule: ScaleRule = MAXIMUM, seen: Seen | None = None, *, name: str
) -> QuantizedWeight:
    """Round to nearest: q = round(w / scale + zero), scale = α / (2^(b - 1) - 1), of e4m3 α / 448.

    Args:
        w_FD: any floating dtype and strides.
        cfg: how it is stored.
        rule: how α is found.
        seen: weighs the errors that `rule.clip=mse` looks at; None, or without rows = all alike.
        name: the matrix', for errors.

    Raises:
        NonFiniteError: NaN or infinity in the weights or in what was seen.
        ConfigError: groups that do not divide D.
    """
    check_finite(w_FD, name)
    square_D = seen.square_D if seen is not None and seen.count else None
    if square_D is not None:
        check_finite(square_D, name, "rows")
    scale, zero = fit_scale(w_FD, cfg, rule, square_D)
    return encode(w_FD, scale, zero, cfg.bits, kind=cfg.kind, rows=cfg.rows)


def check_finite(w_FD: Tensor, name: str, what: str = "weights") -> None:
    """Raises NonFiniteError where a number is NaN or infinite."""
    finite = w_FD.isfinite()
    if not finite.all():
        count = int((~finite).sum())
        raise NonFiniteError(f"{name} has {what} with NaN or infinity ({count}): round a model whose loss is finite")
