"""The mean of a gauge over time."""


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
