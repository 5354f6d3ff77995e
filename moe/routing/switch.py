"""Switch top-1 routing (Fedus et al. 2101.03961 eq. 1–2): y = p_e(x) · E_e(x), e = argmax p."""

from collections.abc import Mapping
from typing import Any

from .router import Router


class SwitchRouter(Router):
    """One expert a token; the gate value is not renormalised, since it carries the router's gradient."""

    def rule(self) -> Mapping[str, Any]:
        return {}
