"""Notices that the engine does not come back from a step: a hung kernel, a peer that is silent, a lock."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

LOOKS = 4
"""How often it looks within its patience."""


class Watchdog:
    """Raises one alarm when a step takes too long, in a thread of its own. `begin` and `end` belong to one thread.

    Args:
        seconds: its patience.
        alarm: called after all stacks were written to stderr.
    """

    def __init__(self, seconds: float, alarm: Callable[[], None]) -> None:
        self._seconds, self._alarm = seconds, alarm
        self._since: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="turnout-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread, once."""
        self._thread.start()

    def begin(self) -> None:
        """A step begins."""
        self._since = time.monotonic()

    def end(self) -> None:
        """It is over, and nothing is watched until the next one."""
        self._since = None

    def stop(self) -> None:
        """Watch no more."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._seconds / LOOKS):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                self._alarm()
                return
