"""Small MoE layers for tests, of every router, and a context that each of them can run with."""

import torch

from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.moe.routing.registry import ROUTERS

WIDTH = 16
NAMES = tuple(ROUTERS)
LEARNED = tuple(name for name in NAMES if name != "hash")


def make(router: str = "switch", experts: int = 4, seed: int = 0, layer: int = 0, **changes) -> MoE:
    """A layer in training mode whose every parameter and bias is random, so that no two experts tie."""
    torch.manual_seed(seed)
    options = {"width": WIDTH, "expert_width": 8, "num_experts": experts, "router": router, "init_scale": 2.0}
    module = MoE(MoEConfig(**options | changes), layer)
    for tensor in [*module.router.parameters(), *module.router.buffers()]:
        if not tensor.any():
            torch.nn.init.normal_(tensor, std=0.1)
    return module


def context(tokens: int, **changes) -> RouteContext:
    """One with token ids, which hash routing needs."""
    return RouteContext(token_ids_T=torch.arange(tokens) * 7 % 31, **changes)


def gradients(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not differing, differing
