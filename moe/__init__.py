"""The model and its life: what is computed (layers, routing, models), what it learns from, how it is trained."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig, MoEConfig
    from .layers.moe import MoE
    from .models.context import VarlenContext
    from .models.decoder import Decoder
    from .models.store import load_model, save_model
    from .routing.recompute import keep_routing
    from .routing.record import RouteContext, Routing

_LAZY = {
    "MoE": ".layers.moe",
    "MoEConfig": ".config",
    "ModelConfig": ".config",
    "Decoder": ".models.decoder",
    "RouteContext": ".routing.record",
    "Routing": ".routing.record",
    "VarlenContext": ".models.context",
    "keep_routing": ".routing.recompute",
    "load_model": ".models.store",
    "save_model": ".models.store",
}

__all__ = [
    "Decoder",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "RouteContext",
    "Routing",
    "VarlenContext",
    "keep_routing",
    "load_model",
    "save_model",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
