"""The mixture-of-experts layer: router + dispatcher + experts, usable in anyone's model (docs/moe_layer.md).

    layer = MoE(MoEConfig(width=512, expert_width=1024, num_experts=8, top_k=2, router="gshard"))
    y_TD, routing = layer(x_TD)          # balance and z losses reach the router in y's backward pass

T tokens, D width, K choices.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import pointwise
from ...parallel.dispatch.local import LocalDispatcher
from ..config import MoEConfig
from ..routing.losses import attach_loss, weighted_sum
from ..routing.record import RouteContext, Routing
from ..routing.registry import build_router
from .dropout import dropped_units, row_keys
from .experts import Experts
from .ffn import FeedForward
from .linear import Linear


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
        self.shared_gate = Linear(cfg.width, 1, bias=False) if cfg.shared_gate else None
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
        if torch.compiler.is_dynamo_compiling():
            from .uncompiled import routed

            y_TD, routing = routed(self, x_TD, context)
            shared_TD = self.always(x_TD)
        else:
            routing, sent = self.send(x_TD, context)
            shared_TD = self.always(x_TD)
            y_TD = self.mix(routing, sent, context)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        loss = weighted_sum(self.cfg.losses, routing.aux, y_TD.requires_grad) if routing.aux else None
        return y_TD if loss is None else attach_loss(y_TD, context.loss_scale * loss), routing

    def send(self, x_TD: Tensor, context: RouteContext) -> tuple[Routing, Any]:
        """Choose experts and let the rows set out for them; the routing, and what `mix` needs.

        Rows stay where they are if all experts live here and `moe_mlp` can do the whole.
        """
        routing = self.router(x_TD, context)
        drops = self.training and self.cfg.expert_dropout > 0
        key_TK = row_keys(routing.ids_TK, context) if drops else None
        x_TD = _travelling(x_TD)
        if type(self.dispatcher) is LocalDispatcher and self.experts.plain and not drops:
            return routing, x_TD
        return routing, self.dispatcher.dispatch(x_TD, routing.ids_TK, routing.kept_TK, self.cfg.num_experts, key_TK)

    def always(self, x_TD: Tensor) -> Tensor | None:
        """g(x) · shared(x); None without shared experts."""
        if self.shared is None:
            return None
        shared_TD = self.shared(x_TD)
        return shared_TD if self.shared_gate is None else pointwise(torch.sigmoid, self.shared_gate(x_TD)) * shared_TD

    def mix(self, routing: Routing, sent: Any, context: RouteContext) -> Tensor:
        """Σ_k w_k · E_{id_k}(x), of the rows that were sent."""
        if isinstance(sent, Tensor):
            return self.experts.mix(sent, routing.ids_TK, routing.weights_TK, routing.kept_TK)

        def experts(rows_ND: Tensor, ends_E: Tensor, key_N: Tensor | None) -> Tensor:
            dropped_NF = None if key_N is None else dropped_units(self.cfg, self.router.layer, key_N, context)
            return self.experts(rows_ND, ends_E, dropped_NF)

        return self.dispatcher.combine(sent, experts, routing.weights_TK)


def _travelling(x_TD: Tensor) -> Tensor:
    """As autocast would make the experts' operand, so that rows are copied and sent in that dtype."""
    kind = x_TD.device.type
    casts = torch.is_autocast_enabled(kind) and x_TD.dtype != torch.float64
    return x_TD.to(torch.get_autocast_dtype(kind)) if casts else x_TD
