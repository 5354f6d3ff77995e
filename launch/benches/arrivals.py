"""When requests are due: the shapes of load. Each maps the arrivals of a Poisson process of one a second, which the
workload brings, so that a seed gives the same pattern at every rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...configs.typed import check
from .online import Ask

Shape = Literal["poisson", "burst", "ramp", "closed", "trace"]


@dataclass(frozen=True, kw_only=True)
class Burst:
    """So many requests at once, and so many seconds until the next ones."""

    size: int = 8
    gap: float = 2.0

    def __post_init__(self) -> None:
        check(self.size >= 1, "burst.size", self.size, "must be at least 1", "use 8")
        check(0 < self.gap < math.inf, "burst.gap", self.gap, "must be positive", "use seconds, such as 2")


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A Poisson process whose rate goes from `start` to `end` requests a second in so many seconds, and stays there."""

    start: float = 1.0
    end: float = 8.0
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("start", "end", "seconds"):
            value = getattr(self, name)
            enough = value >= 0 if name == "start" else value > 0
            check(enough and value < math.inf, f"ramp.{name}", value, "must be positive", "use a finite number")


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """How requests arrive.

    Args:
        load: the shape; None = Poisson where a rate is given, else all at once.
        rate: requests a second, a run for each; of a trace its mean.
        concurrency: seats of the closed loop, a run for each.
        burst, ramp: of those shapes.

    Raises:
        ConfigError: a number out of range, or one that the shape does not take.
    """

    load: Shape | None = None
    rate: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()
    burst: Burst = field(default_factory=Burst)
    ramp: Ramp = field(default_factory=Ramp)

    def __post_init__(self) -> None:
        for rate in self.rate:
            check(0 < rate < math.inf, "rate", rate, "must be positive", "use requests a second")
        for seats in self.concurrency:
            check(seats >= 1, "concurrency", seats, "must be at least 1", "use how many run at once")
        closed = self.load == "closed"
        check(closed == bool(self.concurrency), "concurrency", self.concurrency, "is for load=closed, which needs it",
              "set both or none")  # fmt: skip
        check(self.load != "poisson" or bool(self.rate), "rate", self.rate, "is needed by load=poisson", "use rate=2")
        free = self.load in (None, "poisson", "trace")
        check(free or not self.rate, "rate", self.rate, f"is not taken by load={self.load}", "leave it out")


@dataclass(frozen=True)
class Load:
    """Requests with their times.

    Args:
        label: what tells it from others: its rate or its seats.
        asks: the requests.
        seats: of the closed loop; None = open.
    """

    label: dict[str, Any]
    asks: tuple[Ask, ...]
    seats: int | None = None


def loads(arrivals: Arrivals, asks: Sequence[Ask]) -> list[Load]:
    """A load for every rate or number of seats that is asked for.

    Args:
        arrivals: the shape.
        asks: due as the process of one a second has it (`trace`: as was written).
    """
    if arrivals.load == "closed":
        return [
            Load({"concurrency": seats}, tuple(replace(a, due=0.0) for a in asks), seats)
            for seats in arrivals.concurrency
        ]
    if arrivals.rate:
        return [Load({"rate": rate}, _at(asks, _scale(arrivals, asks, rate))) for rate in arrivals.rate]
    return [Load({}, _at(asks, _scale(arrivals, asks, None)))]


def _at(asks: Sequence[Ask], due: Sequence[float]) -> tuple[Ask, ...]:
    return tuple(replace(ask, due=at) for ask, at in zip(asks, due, strict=True))


def _scale(arrivals: Arrivals, asks: Sequence[Ask], rate: float | None) -> list[float]:
    if arrivals.load == "burst":
        return [i // arrivals.burst.size * arrivals.burst.gap for i in range(len(asks))]
    if arrivals.load == "ramp":
        return [_risen(ask.due, arrivals.ramp) for ask in asks]
    if arrivals.load == "trace":
        written = (len(asks) - 1) / max(asks[-1].due, 1e-9)  # requests a second
        return [ask.due * (1.0 if rate is None else written / rate) for ask in asks]
    return [0.0 if rate is None else ask.due / rate for ask in asks]


def _risen(count: float, ramp: Ramp) -> float:
    """When the expected number of arrivals, start·t + (end - start)·t²/2·seconds, reaches `count`."""
    whole = (ramp.start + ramp.end) / 2 * ramp.seconds
    if count > whole:
        return ramp.seconds + (count - whole) / ramp.end
    slope = (ramp.end - ramp.start) / ramp.seconds
    return 2 * count / (ramp.start + math.sqrt(max(ramp.start**2 + 2 * slope * count, 0.0))) if count else 0.0
