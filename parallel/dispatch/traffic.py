"""What travels between ranks, and how long: bytes sent, seconds waited, seconds under way.

Cheap enough to be always on: four clock readings an exchange, or on a GPU four events, read when somebody asks.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

Moment = float | torch.cuda.Event


class Traffic:
    """Sums over the exchanges of one model on this rank, since the last `clear`."""

    def __init__(self) -> None:
        self.counting = True
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.bytes = 0
        self._waited: list[tuple[Moment, Moment]] = []
        self._under_way: list[tuple[Moment, Moment]] = []

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Nothing inside counts."""
        before, self.counting = self.counting, False
        yield
        self.counting = before

    def started(self, work: dist.Work, sent: int, device: torch.device) -> None:
        """An exchange that sends `sent` bytes to other ranks has begun."""
        if self.counting:
            start, finished = _now(device), self._under_way
            self.bytes += sent
            # Runs when the exchange ends: in gloo's thread, or on a CUDA stream that waits for it.
            work.get_future().add_done_callback(lambda _: finished.append((start, _now(device))))

    def wait(self, work: dist.Work, device: torch.device) -> None:
        """Wait for an exchange: this thread, or on a GPU the current stream."""
        start = _now(device) if self.counting else None
        work.wait()
        if start is not None:
            self._waited.append((start, _now(device)))

    def seconds(self) -> tuple[float, float]:
        """Seconds spent waiting, and seconds under way: from start to end, summed over exchanges."""
        return sum(map(_between, list(self._waited))), sum(map(_between, list(self._under_way)))


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(pair: tuple[Any, Any]) -> float:
    start, end = pair
    if isinstance(end, float):
        return end - float(start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
