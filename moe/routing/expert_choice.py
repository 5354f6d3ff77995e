"""Expert choice (Zhou et al. 2202.09368 §3.2): each expert takes its highest-scoring tokens.

S = softmax over experts; expert e takes the C tokens of each group with the highest S[t, e], ties to the earlier token,
and weighs them by S. The load is even by construction, but how many experts a token gets depends on later tokens.

T tokens, E experts.
"""

import torch
from torch import Tensor

from .capacity import fill
from .record import RouteContext, valid_tokens
from .router import Router, Scores


class ExpertChoiceRouter(Router):
    """Every expert is a choice of every token (K = E), wanted where the expert took it.

    C is the capacity formula's: `moe.top_k` is the mean number of experts a token gets at factor 1. It holds in
    dropless serving too, since it IS the choice; nothing that an expert took is dropped.
    """

    causal = False
    dropless = True
    needs_loss = False

    @property
    def compares_tokens(self) -> bool:
        """An expert compares all tokens of a group."""
        return True

    def select(self, scores: Scores, context: RouteContext) -> tuple[Tensor, Tensor]:
        tokens, experts = scores.logits.shape
        factor = self.factor()
        assert factor is not None, "MoEConfig asks expert_choice for a capacity factor"
        valid_T = valid_tokens(context, tokens, scores.logits.device)
        ids_TE = torch.arange(experts, device=valid_T.device).repeat(tokens, 1)
        # the logarithm still tells probabilities apart that underflow
        turn_N = scores.logits.log_softmax(-1).flatten().argsort(descending=True, stable=True)
        room = self.room(valid_T, factor, context)
        return ids_TE, fill(ids_TE, valid_T[:, None].expand_as(ids_TE), room, turn_N)
