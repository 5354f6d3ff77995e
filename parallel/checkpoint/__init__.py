"""Committed checkpoints: `save`, `latest`, `open_checkpoint`, `restore`. No pickle anywhere."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reader import Checkpoint, latest, open_checkpoint, restore
    from .writer import save

_LAZY = {
    "Checkpoint": ".reader",
    "latest": ".reader",
    "open_checkpoint": ".reader",
    "restore": ".reader",
    "save": ".writer",
}

__all__ = ["Checkpoint", "latest", "open_checkpoint", "restore", "save"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
