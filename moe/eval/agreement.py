"""How far two models send tokens to the same experts. T tokens, K choices."""

from collections.abc import Sequence

from torch import Tensor

from ..routing.record import Routing


def agreement(ours: Sequence[Routing], theirs: Sequence[Routing], valid: Sequence[Tensor]) -> float:
    """The share of their choices, over valid tokens, that ours made too, in whatever order; 1 where there is none.

    What counts is what the routers chose, before any drop.
    """
    same = total = 0
    for a, b, valid_T in zip(ours, theirs, valid, strict=True):
        a_TK = a.decision.choice.masked_fill(~a.wanted_TK, -1)[valid_T]
        asked_TK = b.wanted_TK[valid_T]
        found_TK = (b.decision.choice[valid_T][:, :, None] == a_TK[:, None]).any(-1)
        same += int((found_TK & asked_TK).sum())
        total += int(asked_TK.sum())
    return same / total if total else 1.0
