"""The mixture-of-experts layer: router + dispatcher + experts, usable in anyone's model (docs/moe_layer.md).

    layer = MoE(MoEConfig(width=512, expert_width=1024, num_experts=8, top_k=2, router="gshard"))
    y_TD, routing = layer(x_TD)          # balance and z losses reach the router in y's backward pass

T tokens, D width, K choices.
"""

import torch
from torch import Tensor, nn

from ...parallel.dispatch.local import LocalDispatcher
from ..config import MoEConfig
from ..routing.losses import attach_loss, weighted_sum
from ..routing.record import RouteContext, Routing
from ..routing.registry import build_router
from .dropout import dropped_units
from .experts import Experts
from .ffn import FeedForward


class MoE(nn.Module):
    """y = Σ_k w_k · E_{id_k}(x) + g(x) · shared(x); a dropped choice adds nothing (GShard 2006.16668 eq. 2–4).

    g is 1, or sigmoid(w · x) with `shared_gate` (Qwen2-MoE). `dispatcher` is a plain object (`LocalDispatcher`, or
    `AllToAllDispatcher` when experts are spread over ranks).
    """

    def __init__(self, cfg: MoEConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.router = build_router(cfg, layer)
        self.experts = Experts(cfg)
        hidden = cfg.shared_width or cfg.shared_experts * cfg.expert_width
        self.shared = FeedForward(cfg.width, hidden, cfg.activation) if hidden else None
        self.shared_gate = nn.Linear(cfg.width, 1, bias=False) if cfg.shared_gate else None
        self.dispatcher = LocalDispatcher()

    def forward(self, x_TD: Tensor, context: RouteContext | None = None) -> tuple[Tensor, Routing]:
        """Mix the experts' outputs.

        Args:
            x_TD: hidden states of T packed tokens.
            context: groups, valid tokens, random keys; None = one group, all valid.

        Returns:
            y_TD and the routing record. In training the backward pass of y also trains the configured losses.

        Raises:
            NonFiniteError: a router logit is NaN.
            ConfigError: a configured loss has no gradient, or routing would be computed anew under checkpointing.
        """
        context = context or RouteContext()
        y_TD, routing = self.routed(x_TD, context)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            y_TD = y_TD + (shared_TD if self.shared_gate is None else self.shared_gate(x_TD).sigmoid() * shared_TD)
        loss = weighted_sum(self.cfg.losses, routing.aux, y_TD.requires_grad) if routing.aux else None
        return y_TD if loss is None else attach_loss(y_TD, context.loss_scale * loss), routing

    def routed(self, x_TD: Tensor, context: RouteContext) -> tuple[Tensor, Routing]:
        """Σ_k w_k · E_{id_k}(x), and the routing."""
        if torch.compiler.is_dynamo_compiling():
            from .uncompiled import routed

            return routed(self, x_TD, context)
        routing = self.router(x_TD, context)
        sent = self.dispatcher.dispatch(x_TD, routing.ids_TK, routing.kept_TK, self.cfg.num_experts)
        drops = self.training and self.cfg.expert_dropout > 0
        dropped_NF = dropped_units(self.cfg, self.router.layer, sent, self.dispatcher, context) if drops else None
        y_ND = self.experts(sent.rows_ND, sent.ends_E, dropped_NF)
        return self.dispatcher.combine(y_ND, routing.weights_TK, sent), routing
