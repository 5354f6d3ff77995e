"""Turnout: train and serve sparse Mixture-of-Experts transformers with one set of modules.

The public names. Errors live here because every floor raises them; everything heavier is imported on first use,
so that `import turnout` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inference.core.sampling import SamplingParams
    from .inference.core.structured import StructuredOutputs
    from .inference.llm import LLM

__version__ = "0.1.0"


class TurnoutError(Exception):
    """Root of every error that Turnout raises for its user: the message names field, value, rule and fix."""


class ConfigError(TurnoutError, ValueError):
    """A configuration value that can not work (exit code 2)."""


class DataError(TurnoutError, ValueError):
    """A data file that is missing, empty or corrupt (exit code 3)."""


class NonFiniteError(TurnoutError, ArithmeticError):
    """Loss, gradients or logits stopped being finite (exit code 4)."""


class PeerError(TurnoutError, RuntimeError):
    """Another rank is gone, hangs or disagrees (exit code 5).

    Args:
        message: which operation failed, and which rank does not answer.
        silent: processes of this machine that do not answer.
    """

    def __init__(self, message: str, silent: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.silent = silent


class CheckpointError(TurnoutError, RuntimeError):
    """A checkpoint that can not be written, verified or fitted (exit code 6)."""


class RequestError(TurnoutError, ValueError):
    """A request that can not be served as asked; `param` names the field (HTTP 400).

    Args:
        message: what is wrong and what to do about it.
        param: the request's field, or None when no single field is at fault.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


_LAZY = {
    "LLM": ".inference.llm",
    "SamplingParams": ".inference.core.sampling",
    "StructuredOutputs": ".inference.core.structured",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NonFiniteError",
    "PeerError",
    "RequestError",
    "SamplingParams",
    "StructuredOutputs",
    "TurnoutError",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
