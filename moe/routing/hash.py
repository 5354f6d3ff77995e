"""Hash layers (Roller et al. 2106.04426): the expert is a fixed hash of the token id, and nothing is learned.

T tokens, E experts.
"""

import torch
from torch import Tensor

from ...configs.typed import check
from ...kernels.random import philox
from .record import RouteContext
from .router import Router, Scores

KEY = (2106, 4426)


class HashRouter(Router):
    """One expert a token with weight 1; no parameters, and another hash in every layer.

    Its probabilities are one-hot and its logits zero, so metrics see the entropy 0 that a fixed choice has. A reroute
    asks the following experts in turn.
    """

    needs_loss = False

    def build(self) -> None:
        """Nothing to build."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def causal_in_training(self) -> bool:
        """All gates are alike, so that the order `probability` is token_major."""
        alike = self.cfg.drop_order == "probability" and not self.cfg.reroute
        return super().causal_in_training or alike

    def score(self, x_TD: Tensor, context: RouteContext) -> Scores:
        """Raises ConfigError when the context has no token ids."""
        rule = "needs the token ids, which the RouteContext lacks"
        check(context.token_ids_T is not None, "moe.router", "hash", rule, "pass RouteContext(token_ids_T=...)")
        assert context.token_ids_T is not None
        experts = self.cfg.num_experts
        hash_T1 = hash_ids(context.token_ids_T.to(x_TD.device), self.layer, experts)[:, None]
        distance_TE = (torch.arange(experts, device=x_TD.device) - hash_T1) % experts
        one_hot_TE = (distance_TE == 0).to(x_TD.dtype)
        return Scores(
            logits=torch.zeros_like(one_hot_TE), probs=one_hot_TE, rank=-distance_TE.to(x_TD.dtype),
            gates=torch.ones_like(one_hot_TE),
        )  # fmt: skip


def hash_ids(token_ids_T: Tensor, layer: int, num_experts: int) -> Tensor:
    """The expert of each token id: the first word of Philox4x32-10 of (id, layer), modulo E. int64 [T]."""
    zero_T = torch.zeros_like(token_ids_T, dtype=torch.int64)
    counter = (token_ids_T.long() & 0xFFFFFFFF, zero_T, zero_T + layer, zero_T)
    return philox(counter, (zero_T + KEY[0], zero_T + KEY[1]))[0] % num_experts
