"""A matrix, or each expert's, pruned by any method, with a record of what became of it.

F output width, D input width, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ... import NonFiniteError
from ...configs.typed import check
from .scores import magnitude, wanda
from .seen import Seen
from .sparsegpt import DAMP, sparsegpt
from .sparsity import Sparsity

Method = Literal["magnitude", "wanda", "sparsegpt"]


@dataclass(frozen=True)
class Pruned:
    """What became of a matrix.

    Attributes:
        name: the matrix'.
        sparsity: share of its weights that are zero now.
        error: Σ ‖(W - Ŵ) x‖² over the rows x that were seen, tr(Δ·G·Δᵀ); None where no Gram matrix was kept.
        energy: Σ ‖W x‖² of the same rows.
        fallback: why magnitudes decided in place of the method; None where they did not.
    """

    name: str
    sparsity: float
    error: float | None
    energy: float | None
    fallback: str | None


def prune(
    w_FD: Tensor, seen: Seen, sparsity: Sparsity, method: Method, *, name: str, min_rows: int = 1, damp: float = DAMP
) -> tuple[Tensor, Pruned]:
    """A matrix with zeros, of the same shape and dtype, and what became of it.

    Magnitudes decide where calibration can not: fewer than `min_rows` rows, rows of zeros only, a Hessian that is not
    positive definite.

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
            new_FD = sparsegpt(w_FD, seen, sparsity, damp)
    except torch.linalg.LinAlgError:
        fallback, new_FD = "its Hessian is not positive definite", magnitude(w_FD, sparsity)
    zeros = float((new_FD == 0).double().mean())
    return new_FD, Pruned(name, zeros, _energy(w_FD - new_FD, seen), _energy(w_FD, seen), fallback)


def prune_experts(
    w_EFD: Tensor,
    seen: Sequence[Seen],
    sparsity: Sparsity,
    method: Method,
    *,
    name: str,
    min_rows: int,
    damp: float = DAMP,
) -> tuple[Tensor, list[Pruned]]:
    """A stack, each expert by the rows that it was sent itself; `name[e]` is named in its record. Raises as `prune`."""
    made = [
        prune(w_FD, own, sparsity, method, name=f"{name}[{e}]", min_rows=min_rows, damp=damp)
        for e, (w_FD, own) in enumerate(zip(w_EFD, seen, strict=True))
    ]
    return torch.stack([w_FD for w_FD, _ in made]), [pruned for _, pruned in made]


def _energy(w_FD: Tensor, seen: Seen) -> float | None:
    """Σ ‖W x‖² = tr(W·G·Wᵀ)."""
    if seen.gram_DD is None:
        return None
    w_FD = w_FD.to(torch.promote_types(w_FD.dtype, seen.gram_DD.dtype))
    return float(((w_FD @ seen.gram_DD.to(w_FD.dtype)) * w_FD).sum())
