"""What an engine tells about itself, in numbers."""

from dataclasses import dataclass, fields

from ..moe.routing.stats import RoutingSnapshot
from .core.gauge import Histogram
from .core.scheduler import SchedulerStats

GAUGES = tuple(field.name for field in fields(SchedulerStats))
STEP_TOKENS = tuple(2**i for i in range(15))
"""Bounds of the histogram of a step's tokens."""


@dataclass(frozen=True, slots=True)
class EngineStats(SchedulerStats):
    """The scheduler's gauges and counters, and the engine's own since start.

    Args:
        kv_utilisation_mean: of `kv_utilisation` over the time in which it was not idle.
        steps: steps that computed something.
        step_tokens: how many tokens they computed.
        computed_tokens: tokens that went through the model, recomputed ones included.
        routing: what the routers did with them.
        all_to_all_bytes: what ranks have sent one another for experts, as of the last sum over ranks.
    """

    kv_utilisation_mean: float
    steps: int
    step_tokens: Histogram
    computed_tokens: int
    routing: RoutingSnapshot
    all_to_all_bytes: int
