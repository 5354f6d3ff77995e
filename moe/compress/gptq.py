"""GPTQ: round a matrix column by column, and let the columns to come make up for each one's error.

Frantar et al. 2210.17323, Algorithm 1. F output width, D input width, B columns of a block, G groups.
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ...kernels.quantized import QuantizedWeight, encode, nearest
from ..quantization_config import QuantizationConfig
from .clipping import MAXIMUM, ScaleRule, fit_scale
from .rounding import check_finite, round_weight
from .seen import Seen
from .sparsegpt import BLOCK, DAMP, inverse_root


@dataclass(frozen=True)
class Fitted:
    """What became of a matrix.

    Attributes:
        name: the matrix'.
        rows: how many were seen.
        before: Σ ‖(W - Ŵ) x‖² over the rows x that were seen, tr(Δ·G·Δᵀ), of Ŵ rounded to nearest.
        after: the same of what is stored.
        fallback: why it is rounded to nearest; None where it is not.
    """

    name: str
    rows: int
    before: float
    after: float
    fallback: str | None


def gptq(
    w_FD: Tensor,
    seen: Seen,
    cfg: QuantizationConfig,
    rule: ScaleRule = MAXIMUM,
    *,
    name: str,
    damp: float = DAMP,
    act_order: bool = False,
    min_rows: int = 1,
) -> tuple[QuantizedWeight, Fitted]:
    """A matrix rounded near the least Σ ‖(W - Ŵ) x‖² over the rows that were seen.

    Where calibration can not decide it is rounded to nearest by its weights alone: fewer than `min_rows` rows, rows of
    zeros only, a Hessian that is not positive definite.

    Args:
        w_FD: any floating dtype and strides; one expert's of a stack, by its own rows.
        seen: with its Gram matrix, the Hessian but for a factor.
        cfg: how it is stored.
        rule: how scales are found: of a row from its weights, of a group from what they are when its columns come.
        name: the matrix'.
        damp: share of the mean diagonal that is added to the Hessian.
        act_order: columns of large moments first, with scales of groups from the weights; stored in their own order.
        min_rows: fewer say too little.

    Raises:
        NonFiniteError: NaN or infinity in the weights or in what was seen.
        ConfigError: groups that do not divide D.
    """
    assert seen.gram_DD is not None, "GPTQ needs a Gram matrix"
    check_finite(seen.gram_DD, name, "rows")
    fallback = seen.lack(min_rows)
    plain = round_weight(w_FD, cfg, rule, None if fallback else seen, name=name)
    before = _error(w_FD, plain, seen.gram_DD)
    if fallback is None:
        order_D = seen.square_D.argsort(descending=True, stable=True) if act_order else torch.arange(plain.depth)
        scales = (plain.scale, plain.zero) if act_order or cfg.group is None or rule.whole else None
        try:
            root_DD = inverse_root(seen.gram_DD[order_D][:, order_D], damp)
            made = _columns(w_FD, root_DD, order_D, cfg, scales, rule, seen.square_D)
            return made, Fitted(name, seen.count, before, _error(w_FD, made, seen.gram_DD), None)
        except torch.linalg.LinAlgError:
            fallback = "its Hessian is not positive definite"
    return plain, Fitted(name, seen.count, before, before, fallback)


def _columns(
    w_FD: Tensor,
    root_DD: Tensor,
    order_D: Tensor,
    cfg: QuantizationConfig,
    scales: tuple[Tensor, Tensor] | None,
    rule: ScaleRule,
    square_D: Tensor,
) -> QuantizedWeight:
    """Algorithm 1; columns are rows here, so that each lies in one piece. `scales` None = found as groups come."""
    own_DF = w_FD.to(torch.promote_types(w_FD.dtype, torch.float32)).mT[order_D].contiguous()
    root_DD, depth = root_DD.to(own_DF.dtype), len(own_DF)
    size = cfg.group or depth
    block = gcd(BLOCK, size) if cfg.group else BLOCK  # a group begins with a block: then all before has reached it
    scale_GF, zero_GF = _by_group(scales, depth // size, own_DF)
    for start in range(0, depth, block):
        end = min(start + block, depth)
        if scales is None and start % size == 0:
            group = slice(start, start + size)
            found = fit_scale(own_DF[group].mT, cfg, rule, square_D[group])
            scale_GF[start // size], zero_GF[start // size] = (x.flatten() if x.numel() else 0 for x in found)
        own_BF, root_BB = own_DF[start:end], root_DD[start:end, start:end]
        error_BF = torch.empty_like(own_BF)
        for at, group_at in enumerate((order_D[start:end] // size).tolist()):
            scale_F, zero_F = scale_GF[group_at], zero_GF[group_at] if cfg.zero else None
            q_F = nearest(own_BF[at], scale_F, zero_F, cfg.bits, cfg.kind)
            stored_F = (q_F if zero_F is None else q_F - zero_F) * scale_F
            error_BF[at] = (own_BF[at] - stored_F) / root_BB[at, at]
            own_BF[at + 1 :].addr_(root_BB[at, at + 1 :], error_BF[at], alpha=-1)
            own_BF[at] = stored_F
        own_DF[end:].addmm_(root_DD[start:end, end:].mT, error_BF, alpha=-1)
    stored_FD = torch.empty_like(own_DF).index_copy_(0, order_D, own_DF).mT
    scale, zero = ((x_GF.mT if cfg.group else x_GF[0]).float() for x_GF in (scale_GF, zero_GF))
    return encode(stored_FD, scale, zero if cfg.zero else None, cfg.bits, kind=cfg.kind, rows=cfg.rows)


def _by_group(scales: tuple[Tensor, Tensor] | None, groups: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [G, F]: those that are known, or room for them."""
    scale_GF = like.new_zeros(groups, like.shape[1])
    zero_GF = torch.zeros_like(scale_GF)
    for made_GF, known in zip((scale_GF, zero_GF), scales or (), strict=False):
        if known.numel():
            made_GF.copy_(known.view(like.shape[1], groups).mT)
    return scale_GF, zero_GF


def _error(w_FD: Tensor, made: QuantizedWeight, gram_DD: Tensor) -> float:
    """tr(Δ·G·Δᵀ)."""
    off_FD = w_FD.float() - made.dequantized()
    return float(((off_FD @ gram_DD) * off_FD).sum())
