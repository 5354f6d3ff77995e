"""All experts live on this rank: sort by expert, compute, gather back.

T tokens, D width, E experts held here, K choices, N kept assignments.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...kernels import combine, permute, sort_by_expert

# rows sorted by expert, their cumulative ends (int32) by expert, and each row's key → outputs of the same rows
Experts = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Dispatched:
    """Rows on their way to the experts.

    Attributes:
        rows_ND: one row for every kept assignment, sorted by expert, then by token and choice.
        ends_E: int32, cumulative row ends over the experts (what grouped GEMM wants).
        key_N: the integer of each row, if any were given.
        order_N: flat index t * K + k of each kept assignment, in that order.
        slot_TK: row of assignment (t, k) in that order, -1 when it was dropped.
    """

    rows_ND: Tensor
    ends_E: Tensor
    key_N: Tensor | None
    order_N: Tensor
    slot_TK: Tensor


class LocalDispatcher:
    """The dispatcher of a layer whose experts all live here. Stateless; the interface of every dispatcher."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, kept_TK: Tensor, num_experts: int, key_TK: Tensor | None = None
    ) -> Dispatched:
        """Send each token to the experts of its kept choices. What is computed until `combine` runs beside it.

        Args:
            x_TD: hidden states, in the dtype in which they are to travel.
            ids_TK: int64 global expert ids.
            kept_TK: bool, False for assignments that are dropped.
            num_experts: E, of the whole layer.
            key_TK: int64, an integer of each assignment that goes with its row.
        """
        order_N, slot_TK, counts_E = sort_by_expert(ids_TK, kept_TK, num_experts)
        key_N = None if key_TK is None else key_TK.flatten()[order_N]
        return Dispatched(permute(x_TD, order_N, slot_TK), ends(counts_E), key_N, order_N, slot_TK)

    def combine(self, sent: Dispatched, experts: Experts, weights_TK: Tensor) -> Tensor:
        """y_TD = Σ_k weights[t, k] · experts(row of (t, k)), k ascending, in float32; dropped choices add 0."""
        y_ND = experts(sent.rows_ND, sent.ends_E, sent.key_N)
        return combine(y_ND, weights_TK, sent.order_N, sent.slot_TK)


def ends(counts_E: Tensor) -> Tensor:
    """Cumulative row ends, int32, of experts with these many rows."""
    return counts_E.cumsum(0).int()
