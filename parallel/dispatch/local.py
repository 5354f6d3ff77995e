"""All experts live on this rank: sort by expert, compute, gather back.

T tokens, D width, E experts held here, K choices, N kept assignments.
"""

from dataclasses import dataclass

from torch import Tensor

from ...kernels import combine, permute, sort_by_expert


@dataclass(frozen=True)
class Dispatched:
    """Rows on their way through the experts.

    Attributes:
        rows_ND: one row for every kept assignment to a local expert, sorted by expert, then by source rank and token.
        ends_E: int32, cumulative row ends over the local experts (what grouped GEMM wants).
        order_N: flat index t * K + k of each of this rank's kept assignments, sorted by global expert.
        slot_TK: row of assignment (t, k) in that order, -1 when it was dropped.
    """

    rows_ND: Tensor
    ends_E: Tensor
    order_N: Tensor
    slot_TK: Tensor


class LocalDispatcher:
    """The dispatcher of a layer whose experts all live here. Stateless; the interface of every dispatcher."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> Dispatched:
        """Copy each token once for every kept choice, sorted by expert.

        Args:
            x_TD: hidden states.
            ids_TK: int64 global expert ids.
            kept_TK: bool, False for assignments that are dropped.
            num_experts: E, of the whole layer.
        """
        order_N, slot_TK, counts_E = sort_by_expert(ids_TK, kept_TK, num_experts)
        return Dispatched(permute(x_TD, order_N, slot_TK), ends(counts_E), order_N, slot_TK)

    def combine(self, y_ND: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """y_TD = Σ_k weights[t, k] * y of that assignment, k ascending, accumulated in float32; dropped ones add 0."""
        return combine(y_ND, weights_TK, sent.order_N, sent.slot_TK)

    def carry(self, values_TK: Tensor, sent: Dispatched) -> Tensor:
        """values_N: one integer of each assignment, where its row is; carries no gradient."""
        return values_TK.flatten()[sent.order_N]


def ends(counts_E: Tensor) -> Tensor:
    """Cumulative row ends, int32, of experts with these many rows."""
    return counts_E.cumsum(0).int()
