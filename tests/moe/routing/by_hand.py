"""Routers whose logits are their input, so that a test can write the logits down."""

import torch

from turnout.moe import MoEConfig, RouteContext
from turnout.moe.routing.record import Routing
from turnout.moe.routing.registry import build_router
from turnout.moe.routing.router import Router


def make(router: str, experts: int, *, training: bool = True, layer: int = 0, **settings) -> Router:
    """Width = experts and weight = identity; hash has no weight."""
    module = build_router(
        MoEConfig(width=experts, expert_width=4, num_experts=experts, router=router, **settings), layer
    )
    for parameter in module.parameters():
        parameter.data = torch.eye(experts)
    return module.train(training)


def route(router: str, logits, context: RouteContext | None = None, **settings) -> Routing:
    """What the router makes of these logits."""
    logits = torch.as_tensor(logits)
    return make(router, logits.shape[1], **settings)(logits, context or RouteContext())


def kept(routing: Routing) -> list[list[int]]:
    """kept_TK as ones and zeros."""
    return routing.kept_TK.int().tolist()
