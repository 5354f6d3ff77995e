"""What the routes and the life cycle share: the engine, the phase the server is in, the calls in flight."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ..core.sampling import SamplingParams
from .config import ServerConfig
from .errors import ApiError
from .generation import Generation
from .history import RoutingHistory
from .logs import entry
from .metrics import Metrics
from .protocol import Prompt
from .traces import Traces

if TYPE_CHECKING:
    from ..async_engine import AsyncEngine
    from ..stats import EngineStats

Phase = Literal["loading", "ready", "shutting down", "broken"]


class Service:
    """One server's state. Touched on its event loop only.

    Args:
        config: the server's settings.
        model_name: the one model that is served.
    """

    def __init__(self, config: ServerConfig, model_name: str) -> None:
        self.config = config
        self.model_name = model_name
        self.created = int(time.time())
        self.phase: Phase = "loading"
        self.engine: AsyncEngine | None = None
        self.calls: set[Generation] = set()
        self.metrics = Metrics(self._stats, model_name)
        self.history = RoutingHistory()
        self.traces = None if config.otlp_endpoint is None else Traces(config.otlp_endpoint, model_name)

    def ready_engine(self) -> "AsyncEngine":
        """The engine, for a new request.

        Raises:
            ApiError: 503 unless the server is ready.
        """
        if self.engine is None or self.phase != "ready":
            message = f"the server is {self.phase}: try again later"
            raise ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})
        return self.engine

    def start(
        self, prompts: Sequence[Prompt], params: SamplingParams, call_id: str, priority: int = 0, cache_salt: str = ""
    ) -> Generation:
        """Start a call; `end` must follow, whatever happens.

        Raises:
            ApiError: 503 unless the server is ready.
        """
        engine = self.ready_engine()
        generation = Generation(engine, prompts, params, call_id, self.metrics, priority, cache_salt)
        self.calls.add(generation)
        if (this := entry.get()) is not None:
            this.generation = generation
        return generation

    def end(self, generation: Generation) -> None:
        """Abort what still runs of a call, and forget it."""
        generation.close()
        self.calls.discard(generation)

    def check_model(self, name: str) -> None:
        """Raise ApiError 404 for any model but ours."""
        if name != self.model_name:
            message = f"model ({name}) is not served here: use {self.model_name}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _stats(self) -> "EngineStats | None":
        return self.engine.stats() if self.engine is not None else None
