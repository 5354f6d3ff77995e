"""Softmax gating (Shazeer et al. 1701.06538 eq. 2): G = softmax(x · Wᵀ), cut to its k largest gates."""

from collections.abc import Mapping
from typing import Any

from .router import Router


class SoftmaxRouter(Router):
    """The k largest probabilities, not renormalised: with k = E it is eq. 2 as written."""

    def rule(self) -> Mapping[str, Any]:
        return {}
