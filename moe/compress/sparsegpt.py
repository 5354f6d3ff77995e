"""SparseGPT: prune a matrix column by column, and let the columns to come make up for what went.

Frantar & Alistarh 2301.00774, Algorithm 1. F output width, D input width, B columns of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .scores import lowest
from .seen import Seen
from .sparsity import Sparsity

BLOCK = 128  # B, the columns whose updates of later ones are summed up; and Bs, those whose mask is chosen at once
DAMP = 0.01  # of the mean of the Hessian's diagonal, added to it: dead columns and singular ones are ordinary then


def sparsegpt(
    w_FD: Tensor,
    seen: Seen,
    sparsity: Sparsity,
    damp: float = DAMP,
    rounded: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """The matrix with zeros, near the least Σ ‖(W - Ŵ) x‖² over the rows that were seen.

    Args:
        w_FD: computed in float32 at least, returned in its own dtype.
        seen: with its Gram matrix, which is the Hessian but for a factor.
        sparsity: a share of every `BLOCK` columns, or of every span.
        damp: share of the mean diagonal that is added to the Hessian.
        rounded: of the matrix as it is now and a column's number, what its kept weights are stored as, [F], where they
            are rounded too (section 3.5); it is asked for the columns in their order.

    Raises:
        torch.linalg.LinAlgError: the Hessian is not positive definite.
    """
    assert seen.gram_DD is not None, "SparseGPT needs a Gram matrix"
    work = torch.promote_types(w_FD.dtype, torch.float32)
    new_FD, root_DD = w_FD.to(work, copy=True), inverse_root(seen.gram_DD, damp).to(work)
    span = sparsity.span or BLOCK
    step = max(BLOCK // span, 1) * span
    for start in range(0, w_FD.shape[1], step):
        end = min(start + step, w_FD.shape[1])
        w_FB, root_BB = new_FD[:, start:end], root_DD[start:end, start:end]
        error_FB = torch.empty_like(w_FB)
        for at in range(end - start):
            if at % span == 0:
                score_FS = (w_FB[:, at : at + span] / root_BB.diagonal()[at : at + span]).square()
                gone_FS = _gone(score_FS, sparsity, start)
            w_F = w_FB[:, at]
            kept_F = (w_F if rounded is None else rounded(new_FD, start + at)).masked_fill(gone_FS[:, at % span], 0)
            error_FB[:, at] = (w_F - kept_F) / root_BB[at, at]
            w_FB[:, at + 1 :] -= error_FB[:, at, None] * root_BB[at, at + 1 :]
            w_FB[:, at] = kept_F
        new_FD[:, end:] -= error_FB @ root_DD[start:end, end:]
    return new_FD.to(w_FD.dtype)


def inverse_root(gram_DD: Tensor, damp: float = DAMP) -> Tensor:
    """The upper triangular U, float64, with Uᵀ·U = H⁻¹, H = G + damp · mean(diag G) · I.

    U[c, c:] / U[c, c] is how the columns from c on make up for an error in column c, 1 / U[c, c]² what it costs: the
    inverse of H without its first c rows and columns is U[c:, c:]ᵀ · U[c:, c:].

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    h_DD = gram_DD.double()
    h_DD = h_DD + damp * h_DD.diagonal().mean() * torch.eye(len(h_DD), dtype=h_DD.dtype, device=h_DD.device)
    lower_DD = torch.linalg.cholesky(h_DD.flip(0, 1))
    eye_DD = torch.eye(len(h_DD), dtype=h_DD.dtype, device=h_DD.device)
    return torch.linalg.solve_triangular(lower_DD, eye_DD, upper=False).flip(0, 1)


def _gone(score_FS: Tensor, sparsity: Sparsity, start: int) -> Tensor:
    """Which go of the columns from `start` on: of each row's span, or of all, so many that the matrix has its share."""
    if sparsity.span is not None:
        return lowest(score_FS, round(sparsity.share * sparsity.span))
    rows, columns = score_FS.shape
    upto, before = round(sparsity.share * rows * (start + columns)), round(sparsity.share * rows * start)
    return lowest(score_FS.flatten(), upto - before).view_as(score_FS)
