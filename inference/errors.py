"""What can end a request besides its own tokens and its caller. Torch-free, so that the server can tell them apart."""

from .. import TurnoutError


class QueueTimeoutError(TurnoutError, TimeoutError):
    """The request waited longer than `queue_timeout` for its first step (HTTP 503)."""


class StepError(TurnoutError, RuntimeError):
    """Computing this request raised, and computing others did not (HTTP 500); the message has the root cause."""


class EngineStoppedError(TurnoutError, RuntimeError):
    """The engine is shut down or has crashed; the message has the root cause (HTTP 503)."""
