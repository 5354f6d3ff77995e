"""The mean of a gauge over time, and how values are distributed."""

from bisect import bisect_left
from collections.abc import Sequence


class TimeMean:
    """Each value counts for as long as it stood; 0 stands for idle and does not count."""

    def __init__(self) -> None:
        self._value = 0.0
        self._since = 0.0
        self._sum = 0.0
        self._seconds = 0.0

    def note(self, value: float, now: float) -> None:
        """The gauge is at `value` from `now` on (seconds)."""
        if self._value:
            self._sum += self._value * (now - self._since)
            self._seconds += now - self._since
        self._value, self._since = value, now

    @property
    def mean(self) -> float:
        """Up to the last note; 0 when nothing has stood yet."""
        return self._sum / self._seconds if self._seconds else 0.0


class Histogram:
    """How many values lie up to each bound. One thread adds; 0.3 us a value.

    Args:
        bounds: ascending; what exceeds the last one counts there too.
        counts: values above the bound before and up to this one; one more than `bounds`. None = no value yet.
        total: sum of the values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] | None = None, total: float = 0.0) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1) if counts is None else list(counts)
        self.total = total

    def add(self, value: float, times: int = 1) -> None:
        """`value` has been seen so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> "Histogram":
        """As it stands, for other threads."""
        return Histogram(self.bounds, self.counts, self.total)
