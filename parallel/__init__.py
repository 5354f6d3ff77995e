"""Where the model is computed, knowing no model: mesh, placements, dispatchers, gradients, engines, checkpoints."""

import importlib

_LAZY = {
    "Layout": ".config",
    "Mesh": ".mesh",
    "ParallelConfig": ".config",
    "ShardSpec": ".shard",
    "build_mesh": ".mesh",
    "parallelize": ".apply",
}

__all__ = ["Layout", "Mesh", "ParallelConfig", "ShardSpec", "build_mesh", "parallelize"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
