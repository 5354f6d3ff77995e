"""A matrix, or all of a block, pruned by any method, with a record of what became of it.

F output width, D input width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ... import NonFiniteError
from ...configs.typed import check
from .config import CompressConfig
from .scores import magnitude, wanda
from .seen import Seen
from .sparsegpt import DAMP, sparsegpt
from .sparsity import Sparsity
from .watch import Met, places

Method = Literal["magnitude", "wanda", "sparsegpt"]


@dataclass(frozen=True)
class Pruned:
    """What became of a matrix.

    Attributes:
        name: the matrix'.
        weights: how many it has.
        sparsity: share of its weights that are zero now.
        error: Σ ‖(W - Ŵ) x‖² over the rows x that were seen, tr(Δ·G·Δᵀ); None where no Gram matrix was kept.
        energy: Σ ‖W x‖² of the same rows.
        fallback: why magnitudes decided in place of the method; None where they did not.
    """

    name: str
    weights: int
    sparsity: float
    error: float | None
    energy: float | None
    fallback: str | None


def prune(
    w_FD: Tensor,
    seen: Seen,
    sparsity: Sparsity,
    method: Method,
    *,
    name: str,
    min_rows: int = 1,
    damp: float = DAMP,
    rounded: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Tensor, Pruned]:
    """A matrix with zeros, of the same shape and dtype, and what became of it.

    Magnitudes decide where calibration can not: fewer than `min_rows` rows, rows of zeros only, a Hessian that is not
    positive definite; they leave the kept weights as they are.

    Args:
        w_FD: any floating dtype.
        seen: with its Gram matrix for `sparsegpt`.
        sparsity: which share goes.
        method: who chooses.
        name: the matrix'.
        min_rows: fewer say too little.
        damp, rounded: as of `sparsegpt`.

    Raises:
        NonFiniteError: NaN or infinity in the weights or in what was seen.
        ConfigError: a span that does not divide the input width.
    """
    rule = f"must divide the input width of {name} {list(w_FD.shape)}"
    check(w_FD.shape[1] % (sparsity.span or 1) == 0, "sparsity.span", sparsity.span, rule, "use null: zeros anywhere")
    for what, value in (("weights", w_FD), ("rows", seen.square_D), ("rows", seen.gram_DD)):
        if value is not None and not value.isfinite().all():
            raise NonFiniteError(f"{name} has {what} with NaN or infinity: prune a model whose loss is finite")
    fallback = None if method == "magnitude" else seen.lack(min_rows)
    try:
        if method == "magnitude" or fallback:
            new_FD = magnitude(w_FD, sparsity)
        elif method == "wanda":
            new_FD = wanda(w_FD, seen, sparsity)
        else:
            new_FD = sparsegpt(w_FD, seen, sparsity, damp, rounded)
    except torch.linalg.LinAlgError:
        fallback, new_FD = "its Hessian is not positive definite", magnitude(w_FD, sparsity)
    zeros = float((new_FD == 0).double().mean())
    return new_FD, Pruned(name, w_FD.numel(), zeros, energy(w_FD - new_FD, seen), energy(w_FD, seen), fallback)


@torch.no_grad()
def prune_block(block: nn.Module, met: Met, how: CompressConfig, shares: Mapping[str, float]) -> dict[str, Any]:
    """Prune what is rounded elsewhere, in place: projections, and every expert by the rows that it met itself.

    Args:
        block: of whole weights.
        met: what its matrices met; empty where the method needs no text.
        how: method, sparsity, pattern, damp, min_rows.
        shares: of matrices (names as `places` has them) that have another share than the rest.

    Returns:
        `weights` that were looked at; `zeros`, their share; `error`, the share of all outputs' energy over the rows met
        that went, where moments are known; `by_weights`, by matrix why magnitudes decided.

    Raises:
        NonFiniteError, ConfigError: as `prune`.
    """
    method, found = cast(Method, how.method), list[Pruned]()
    for name, w_FD, stack, expert in places(block):
        seen = met[stack][expert] if met else Seen.nothing(w_FD.shape[1], gram=False)
        sparsity = replace(how.zeros, share=shares.get(name, how.zeros.share))
        rows = how.min_rows if name != stack else 1
        new_FD, made = prune(w_FD, seen, sparsity, method, name=name, min_rows=rows, damp=how.damp)
        w_FD.copy_(new_FD)
        found.append(made)
    return told(found)


def told(found: Sequence[Pruned]) -> dict[str, Any]:
    """The notes of a block, as `prune_block` returns them, of its matrices' records."""
    weights = sum(one.weights for one in found)
    lost, whole = (sum(getattr(one, of) or 0.0 for one in found) for of in ("error", "energy"))
    return {
        "weights": weights,
        "zeros": sum(one.sparsity * one.weights for one in found) / weights,
        "error": lost / whole if whole else None,
        "by_weights": {one.name: one.fallback for one in found if one.fallback is not None},
    }


def energy(w_FD: Tensor, seen: Seen) -> float | None:
    """Σ ‖W x‖² = tr(W·G·Wᵀ)."""
    if seen.gram_DD is None:
        return None
    w_FD = w_FD.to(torch.promote_types(w_FD.dtype, seen.gram_DD.dtype))
    return float(((w_FD @ seen.gram_DD.to(w_FD.dtype)) * w_FD).sum())
