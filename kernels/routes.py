"""Operations that note where tokens went: signatures and promises, as in `ops`.

T tokens, E experts, K choices, L layers, S slots.
"""

from collections.abc import Sequence

from torch import Tensor

from . import registry


def tally_routes(
    sums_LN: Tensor, logits: Sequence[Tensor], choices: Sequence[Tensor], wanted: Sequence[Tensor],
    kept: Sequence[Tensor], valid_T: Tensor | None = None, shares: Sequence[Tensor] | None = None,
    sigmoid: bool = False,
) -> None:  # fmt: skip
    """Add to each layer's float64 sums over tokens: wanted choices by expert; drops, T · K, entropies, norms, T.

    Args:
        logits, choices, wanted, kept: of each layer, float32 [T, E], int64 and bool [T, K].
        valid_T: bool; other tokens want nothing and count nowhere. None = all are valid.
        shares: whose entropies are meant, [T, E]; None = of softmax(logits), or of sigmoid(logits) over their sum.
    """
    registry.call("tally_routes", sums_LN, logits, choices, wanted, kept, valid_T, shares, sigmoid)


def store_routes(pages_SLK: Tensor, slots_T: Tensor, ids: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """pages[slots[t], l] = ids[l][t], in place, -1 - ids[l][t] where a choice is not kept; [T, K] of L layers."""
    registry.call("store_routes", pages_SLK, slots_T, ids, kept)
