"""The model and its life: what is computed (layers, routing, models), what it learns from, how it is trained."""

import importlib

_LAZY = {
    "MoE": ".layers.moe",
    "MoEConfig": ".config",
    "ModelConfig": ".config",
    "Decoder": ".models.decoder",
    "RouteContext": ".routing.record",
    "Routing": ".routing.record",
    "VarlenContext": ".models.context",
    "load_model": ".models.store",
    "save_model": ".models.store",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
