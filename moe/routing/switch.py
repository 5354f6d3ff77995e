"""Switch top-1 routing (Fedus et al. 2101.03961 eq. 1–2): y = p_e(x) · E_e(x), e = argmax p."""

import torch
from torch import Tensor

from .record import RouteContext
from .router import Router, top_k_lowest_index


class SwitchRouter(Router):
    """One expert a token; the gate value is not renormalised, since it carries the router's gradient."""

    def choose(self, probs_TE: Tensor, logits_TE: Tensor, context: RouteContext) -> tuple[Tensor, Tensor, Tensor]:
        ids_T1 = top_k_lowest_index(logits_TE, 1)
        return ids_T1, probs_TE.gather(1, ids_T1), torch.ones_like(ids_T1, dtype=torch.bool)
