"""Context parallelism: a row's tokens are divided over ranks, and attention brings the keys and values together.

    k, v of the A tokens here  →  k, v of all W tokens     all-gather; the gradient comes back by a sum
    q of the A tokens here                                 never travels

(Llama 3, 2407.21783 §3.3.2.) It suits packed documents, whose borders need no thought, and grouped heads, which make
keys and values small. `spread.Spread` says which tokens are whose.

P ranks, A tokens that attention computes here, W = P · A tokens of the micro-batch, B documents, G kv heads, d head
size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather import gather
from .spread import Spread


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are attended here, and the keys that they may see.

    Attributes:
        queries: where they lie among the A tokens.
        keys: from the beginning of their first document to their last token, among the W tokens.
        cu_q_B1, cu_k_B1: int32 borders of their documents among these queries and keys; the queries of a document are
            the last of its keys.
    """

    queries: slice
    keys: slice
    cu_q_B1: Tensor
    cu_k_B1: Tensor


def gather_keys(k_AGd: Tensor, v_AGd: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens, in the micro-batch's order: [W, G, d]. Differentiable; collective over "cp"."""
    kv_WGd = spread.in_order(gather(torch.cat([k_AGd, v_AGd], -1), spread.mesh.group("cp"), "keys and values"))
    return kv_WGd[..., : k_AGd.shape[-1]], kv_WGd[..., k_AGd.shape[-1] :]


def pieces(cu_seqlens_B1: Tensor, spread: Spread, window: int | None = None) -> list[Piece]:
    """The two pieces of the micro-batch that a context rank attends, for causal attention.

    Args:
        cu_seqlens_B1: int borders of the W tokens' documents.
        window: the positions that a query sees, its own included; earlier keys are left out.
    """
    borders, found = cu_seqlens_B1.tolist(), []
    half = len(spread.attended_A) // 2
    for first in (0, half):
        begin = int(spread.attended_A[first])
        end = begin + half
        key = max(border for border in borders if border <= begin)
        if window is not None:
            key = max(key, begin - window + 1)
        inner = [border for border in borders if begin < border < end]
        inside_B = torch.tensor([*inner, end], dtype=torch.int32)
        cu_q_B1, cu_k_B1 = (F.pad(inside_B - start, (1, 0)) for start in (begin, key))
        found.append(Piece(slice(first, first + half), slice(key, end), cu_q_B1, cu_k_B1))
    return found
