"""What the routers did in the last seconds: their sums are since start, so two looks at them make a window."""

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...moe.routing.stats import RoutingSnapshot

LONGEST = 60
"""Seconds that a window can have."""
EVERY = 1.0


class RoutingHistory:
    """Snapshots of the routers' sums, one a second, of the last minute.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, RoutingSnapshot]] = deque()
        self._begin: float | None = None

    def look(self, snapshot: "RoutingSnapshot") -> None:
        """Keep a snapshot, unless the last one is younger than a second."""
        now = self._clock()
        self._begin = now if self._begin is None else self._begin
        if self._seen and now - self._seen[-1][0] < EVERY:
            return
        self._seen.append((now, snapshot))
        while len(self._seen) > 1 and self._seen[1][0] <= now - LONGEST:
            self._seen.popleft()

    def window(self, snapshot: "RoutingSnapshot", seconds: float) -> "tuple[float, RoutingSnapshot]":
        """What came to `snapshot`, the newest, in the last `seconds` or a little more, or since the first look.

        Returns:
            The window's true length in seconds, and its sums.
        """
        now = self._clock()
        if not self._seen:
            return 0.0, snapshot.since(snapshot)
        start, earlier = next((seen for seen in reversed(self._seen) if seen[0] <= now - seconds), self._seen[0])
        return now - start, snapshot.since(earlier)

    @property
    def uptime(self) -> float:
        """Seconds since the first look; 0 before it."""
        return 0.0 if self._begin is None else self._clock() - self._begin
