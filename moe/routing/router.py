"""What all routers share: float32 logits, a choice, capacity, losses, one `Routing` out.

A router is a Module because it has weights; the choice itself is the subclass's pure `choose`. The whole computation
is float32 whatever surrounds it ("selective precision", Switch 2101.03961 §2.4). A NaN logit makes that token's weight
NaN, so the loss vote or the sampler sees it; it is never a silent pick.

T tokens, D width, E experts, K choices, G groups.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import uniform
from ...kernels.random import JITTER
from ..config import MoEConfig
from .capacity import capacity, keep_within_capacity
from .losses import router_z, switch_balance
from .record import RouteContext, Routing, group_starts


class Router(nn.Module, ABC):
    """Base of the routers: `forward(x_TD, context) -> Routing`; subclasses define `choose`.

    Attributes:
        weight: float32 [E, D], truncated normal with σ = sqrt(init_scale / D).
        causal: whether a token's choice depends on earlier tokens of its group only.
    """

    causal = True

    def __init__(self, cfg: MoEConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.weight = nn.Parameter(torch.empty(cfg.num_experts, cfg.width, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight afresh (Switch §2.4: truncated normal, small scale)."""
        std = (self.cfg.init_scale / self.cfg.width) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    @abstractmethod
    def choose(self, probs_TE: Tensor, logits_TE: Tensor, context: RouteContext) -> tuple[Tensor, Tensor, Tensor]:
        """The experts each token asks for: (ids_TK int64, weights_TK, wanted_TK bool)."""

    def forward(self, x_TD: Tensor, context: RouteContext) -> Routing:
        """Route T tokens.

        Args:
            x_TD: hidden states, any floating type.
            context: groups, valid tokens, random keys.
        """
        valid_T = x_TD.new_ones(x_TD.shape[0], dtype=torch.bool) if context.valid_T is None else context.valid_T
        cu_groups, group_T = group_starts(context, x_TD.shape[0], x_TD.device)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(self.jitter(x_TD.to(self.weight.dtype), context), self.weight)
            probs_TE = logits_TE.softmax(-1)
            ids_TK, weights_TK, wanted_TK = self.choose(probs_TE, logits_TE, context)
            wanted_TK = wanted_TK & valid_T[:, None]
            aux = self.losses(probs_TE, logits_TE, ids_TK, valid_T, group_T, cu_groups.numel() - 1, context)
        kept_TK = self.keep(ids_TK, wanted_TK, group_T, cu_groups, context)
        counts_E = torch.bincount(ids_TK[valid_T].reshape(-1), minlength=self.cfg.num_experts)
        return Routing(
            ids_TK=ids_TK, weights_TK=weights_TK, kept_TK=kept_TK, counts_E=counts_E,
            probs_TE=probs_TE, logits_TE=logits_TE, aux=aux,
        )  # fmt: skip

    def jitter(self, x_TD: Tensor, context: RouteContext) -> Tensor:
        """Multiply the router's input by U(1 − ε, 1 + ε), in training only (Switch §2.2)."""
        if not (self.training and self.cfg.jitter):
            return x_TD
        draw_TD = self.draw(x_TD.shape[0], context, JITTER, x_TD.shape[1], x_TD.device)
        return x_TD * (1 + self.cfg.jitter * (2 * draw_TD.to(x_TD.dtype) - 1))

    def draw(self, tokens: int, context: RouteContext, purpose: int, count: int, device: torch.device) -> Tensor:
        """Uniform numbers [T, count] keyed by (seed, step, layer, global token index, purpose)."""
        index_T = torch.arange(tokens, device=device) if context.index_T is None else context.index_T
        return uniform(context.seed, index_T, step=context.step, layer=self.layer, purpose=purpose, count=count)

    def keep(
        self, ids_TK: Tensor, wanted_TK: Tensor, group_T: Tensor, cu_groups: Tensor, context: RouteContext
    ) -> Tensor:
        """Apply the present mode's capacity; in evaluation C comes from `capacity_tokens`, never from the batch."""
        cfg = self.cfg
        factor = cfg.capacity_factor if self.training else cfg.eval_capacity_factor
        if factor is None or context.dropless:
            return wanted_TK
        tokens_G = cu_groups.diff()
        if not self.training and cfg.capacity_tokens is not None:
            tokens_G = torch.full_like(tokens_G, cfg.capacity_tokens)
        order = cfg.drop_order if self.training else "token_major"
        capacity_G = capacity(tokens_G, cfg.top_k, cfg.num_experts, factor, cfg.min_capacity)
        return keep_within_capacity(ids_TK, wanted_TK, group_T, capacity_G, cfg.num_experts, order)

    def losses(
        self, probs_TE: Tensor, logits_TE: Tensor, ids_TK: Tensor,
        valid_T: Tensor, group_T: Tensor, groups: int, context: RouteContext,
    ) -> dict[str, Tensor]:  # fmt: skip
        """This rank's part of the balance and z losses, before their coefficients; none outside training."""
        if not self.training:
            return {}
        total: int | Tensor = valid_T.sum().clamp(min=1) if context.total_tokens is None else context.total_tokens
        return {
            "balance": switch_balance(probs_TE, ids_TK, valid_T, group_T, groups, total),
            "z": router_z(logits_TE, valid_T, total),
        }


def top_k_lowest_index(scores_TE: Tensor, top_k: int) -> Tensor:
    """The ids of the k highest scores, best first, ties to the lower index: int64 [T, k]."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
