"""What took how long until an engine was ready."""

import time


class Stages:
    """Seconds by stage, in the order in which they ended; the first one begins now.

    Attributes:
        seconds: stage → how long it took.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, stage: str) -> None:
        """A stage has ended, and the next one begins."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._since
        self._since = now
