"""What each of the last steps computed, for those who watch: the picture of continuous batching.

The engine's thread writes, any thread may read. Nothing is kept unless somebody has asked within the last `WATCHED`
seconds; a step of 64 requests then costs some microseconds.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .core.request import Request
from .core.scheduler import SchedulerStats
from .core.step import StepPlan

WATCHED = 10.0
"""Seconds."""
STEPS = 1024
"""So many steps are kept."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a step computed of one request: its tokens `start` to `start + count - 1`.

    Args:
        samples: they gave the request its next token.
    """

    request: Request
    start: int
    count: int
    samples: bool

    @property
    def decodes(self) -> bool:
        """The one token that was sampled last went in, and the next one came out; everything else is a prefill."""
        return self.samples and self.count == 1 and self.start >= len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step.

    Args:
        number: 1 for the engine's first.
        start: seconds on the engine's clock, which is that of `Request.arrival`.
        seconds: until its results were there; a step that was launched ahead starts when the one before ends.
        num_tokens: of its budget.
        shares: in batch order.
        preempted: requests that lost their blocks before it.
        running, waiting, usage: as `SchedulerStats` has them, after it.
    """

    number: int
    start: float
    seconds: float
    num_tokens: int
    shares: tuple[tuple[Request, int, int, bool], ...]
    preempted: tuple[Request, ...]
    running: int
    waiting: int
    usage: float

    def each(self) -> list[Share]:
        """The shares with names; they are kept as bare tuples, which cost a third."""
        return [Share(*share) for share in self.shares]


class Timeline:
    """The last steps of one engine.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._launches: deque[float] = deque()
        self._ended = float("-inf")
        self._number = 0
        self._until = float("-inf")
        self._ring: list[StepRecord | None] = [None] * STEPS
        self._kept = False

    def since(self, number: int) -> list[StepRecord]:
        """The steps after `number` that are kept, in their order; from now on steps are kept for a while."""
        self._until = self.clock() + WATCHED
        found = [record for record in self._ring if record is not None and record.number > number]
        return sorted(found, key=lambda record: record.number)

    @property
    def last(self) -> int:
        """The number of the last step."""
        return self._number

    def launched(self) -> None:
        """A step begins; the steps end in the order in which they began."""
        self._launches.append(self.clock())

    def committed(self, plan: StepPlan, stats: SchedulerStats, now: float) -> None:
        """The oldest step that was launched has ended and is committed."""
        start = max(self._launches.popleft(), self._ended)
        self._ended = now
        if not plan.scheduled:
            return
        self._number += 1
        if now > self._until:
            self._forget()
            return
        self._kept = True
        self._ring[self._number % STEPS] = StepRecord(
            number=self._number,
            start=start,
            seconds=now - start,
            num_tokens=plan.num_tokens,
            shares=tuple([(item.request, item.start, item.count, item.samples) for item in plan.scheduled]),
            preempted=plan.preempted,
            running=stats.running,
            waiting=stats.waiting,
            usage=stats.usage,
        )

    def discarded(self) -> None:
        """What was launched is not committed."""
        self._launches.clear()

    def _forget(self) -> None:
        if self._kept:
            self._ring, self._kept = [None] * STEPS, False
