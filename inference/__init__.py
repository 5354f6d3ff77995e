"""The serving engine: scheduling core, paged model runner, text, HTTP server. Importing this loads no torch."""

import importlib

_LAZY = {
    "LLM": ".llm",
    "AsyncEngine": ".async_engine",
    "BeamSearchParams": ".beam",
    "Engine": ".engine",
    "EngineConfig": ".config",
    "CompletionOutput": ".outputs",
    "RequestOutput": ".outputs",
    "SamplingParams": ".core.sampling",
    "StructuredOutputs": ".core.structured",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
