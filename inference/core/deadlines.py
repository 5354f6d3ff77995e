"""Which waiting requests have not started by their deadline."""

import heapq
from collections.abc import Callable

from .request import Request, Status


class Deadlines:
    """The deadlines of requests that have not started, the next one first.

    Args:
        timeout: seconds after its arrival by which every request has to start; None = it may wait for ever.
        clock: seconds, the same clock as `Request.arrival`.
    """

    def __init__(self, timeout: float | None, clock: Callable[[], float]) -> None:
        self._timeout, self._clock = timeout, clock
        self._heap: list[tuple[float, int, Request]] = []

    def add(self, request: Request) -> None:
        """Watch a request: its own deadline and the common one, whichever is earlier."""
        limits = [] if request.deadline is None else [request.deadline]
        if self._timeout is not None:
            limits.append(request.arrival + self._timeout)
        if limits:
            heapq.heappush(self._heap, (min(limits), request.order, request))

    def expired(self) -> tuple[Request, ...]:
        """Those whose deadline has come; the caller ends them."""
        late: list[Request] = []
        now = self._clock() if self._heap else 0.0
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].status not in _WAITING):
            _, _, request = heapq.heappop(self._heap)
            if request.status in _WAITING:
                late.append(request)
        return tuple(late)


_WAITING = (Status.HELD, Status.WAITING)
