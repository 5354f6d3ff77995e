"""BASE layers (Lewis et al. 2103.16716) by Sinkhorn's algorithm, as in Megatron-LM: a balanced assignment in training.

With K = exp(h), n tokens and m experts the scales d0, d1 make all rows and all columns of d1 · K · d0 sum alike:

    d0 = 1/n · 1 / (K · d1 + 1e-8),   d1 = 1/m · 1 / (Kᵀ · d0 + 1e-8),   until mean |Δ d1| < 1e-4, at most 100 rounds

A token takes the top k of d1 · K · d0. In evaluation it takes the top k of h, which depends on no other token.

T tokens, E experts, G groups.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import pointwise
from .record import RouteContext, valid_tokens
from .router import Router, Scores

ROUNDS, TOLERANCE, EPSILON = 100, 1e-4, 1e-8


class SinkhornRouter(Router):
    """Balanced in training over each group that shares capacity; weighed by sigmoid(h) for k = 1, else softmax(h).

    The load follows from the assignment, so there is no balance loss. What a reroute asks next goes by h.
    """

    needs_loss = False

    @property
    def compares_tokens(self) -> bool:
        """The assignment balances the whole group, in training."""
        return self.training

    @property
    def causal_in_training(self) -> bool:
        """The assignment balances the whole group."""
        return False

    def score(self, x_TD: Tensor, context: RouteContext) -> Scores:
        scores = super().score(x_TD, context)
        return replace(scores, gates=pointwise(torch.sigmoid, scores.logits)) if self.cfg.top_k == 1 else scores

    def select(self, scores: Scores, context: RouteContext) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super().select(scores, context)
        logits_TE = scores.logits
        valid_T = valid_tokens(context, len(logits_TE), logits_TE.device)
        room = self.room(valid_T, 1.0, context)  # for its groups; its slots come after the assignment
        scale_GE = sinkhorn(logits_TE, valid_T, room.group_T, len(room.slots_GE))
        # the top k of d1 · K · d0: d0 is one factor for the whole row, and the logarithm does not underflow
        return super().select(replace(scores, rank=logits_TE + scale_GE.log()[room.group_T]), context)


def sinkhorn(logits_TE: Tensor, valid_T: Tensor, group_T: Tensor, groups: int) -> Tensor:
    """d1 of each group over its valid tokens: float64 [G, E]; waits for the device once a round.

    A group stops when it has converged itself, so neither its neighbours nor padding move it; in float64 the order of
    summation on a GPU is no matter. A row of K may be scaled freely (d0 takes the inverse), so it is divided by its
    maximum, and exp can not overflow.
    """
    experts = logits_TE.shape[1]
    logits_TE = logits_TE.double()
    kernel_TE = (logits_TE - logits_TE.amax(-1, keepdim=True)).exp()
    here_T = valid_T.double()
    zero_GE = logits_TE.new_zeros(groups, experts)
    tokens_T = logits_TE.new_zeros(groups).index_add(0, group_T, here_T).clamp(min=1)[group_T]
    d1_GE, active_G = torch.ones_like(zero_GE), torch.ones_like(zero_GE[:, 0], dtype=torch.bool)
    for _ in range(ROUNDS):
        d0_T = here_T / tokens_T / ((kernel_TE * d1_GE[group_T]).sum(1) + EPSILON)
        next_GE = 1 / experts / (zero_GE.index_add(0, group_T, kernel_TE * d0_T[:, None]) + EPSILON)
        moved_G = (next_GE - d1_GE).abs().mean(1)
        d1_GE = torch.where(active_G[:, None], next_GE, d1_GE)
        active_G = active_G & (moved_G >= TOLERANCE)
        if not active_G.any():
            break
    return d1_GE
