"""When waiting requests may start: the three ways of batching, as rules of admission over the same steps.

continuous  at every step (Orca, Yu et al. 2022)
static      a batch is admitted whole, and nothing else until all of it has ended
dynamic     as static, but a batch is formed from what arrives within a window, or is full before
"""

from collections.abc import Callable, Sequence

from ..config import EngineConfig
from .request import Request, Status


class Admission:
    """Decides who of those that wait may start.

    Args:
        config: `batching`, `batch_window` and `max_num_seqs`.
        clock: seconds, the same clock as `Request.arrival`; read for dynamic batching only.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float]) -> None:
        self._config, self._clock = config, clock
        self._continuous = config.batching == "continuous"
        self._batch: list[Request] = []

    def form(self, waiting: Sequence[Request], running: Sequence[Request]) -> None:
        """Form the next batch if the last one has ended and this one is due."""
        if self._continuous:
            return
        if all(request.status is Status.FINISHED for request in self._batch):
            self._batch = []
        self._batch += [request for request in waiting if request.parent in self._batch and request not in self._batch]
        if not self._batch and not running and waiting and self.patience(waiting) <= 0:
            self._batch = list(waiting[: self._config.max_num_seqs])

    def first(self, waiting: Sequence[Request]) -> Request | None:
        """The first of those that wait, in order of rank, that may start now."""
        if self._continuous:
            return waiting[0] if waiting else None
        return next((request for request in waiting if request in self._batch), None)

    def patience(self, waiting: Sequence[Request]) -> float:
        """Seconds until the next batch is due, if nothing more arrives."""
        if self._config.batching != "dynamic" or self._batch or len(waiting) >= self._config.max_num_seqs:
            return 0.0
        first = min((request.arrival for request in waiting), default=0.0)
        return first + self._config.batch_window - self._clock() if waiting else 0.0
