"""`moe.router` by name."""

from ..config import MoEConfig
from .gshard import GShardRouter
from .router import Router
from .switch import SwitchRouter

ROUTERS: dict[str, type[Router]] = {"switch": SwitchRouter, "gshard": GShardRouter}


def build_router(cfg: MoEConfig, layer: int = 0) -> Router:
    """The router that `cfg.router` names, for block `layer` (part of its random key)."""
    return ROUTERS[cfg.router](cfg, layer)
