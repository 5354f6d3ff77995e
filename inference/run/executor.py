"""Computes launched steps one after another, in the caller's thread or in one of its own."""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from ..core.step import StepPlan
from .experts import RoutedRows
from .prompt import PromptLogprobs
from .sampler import Sampled


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gives.

    Args:
        sampled: request id → its next token, of every request of the plan that samples.
        routed: request id → where its tokens went, of every request that asks: those that it has not been told yet.
        prompts: request id → log-probabilities of its prompt's tokens, as far as the step has them and it asks.
    """

    sampled: Mapping[str, Sampled]
    routed: Mapping[str, RoutedRows] = field(default_factory=dict)
    prompts: Mapping[str, PromptLogprobs] = field(default_factory=dict)


class Executor:
    """Steps go in by `launch` and their results come out by `collect`, in the same order.

    Args:
        compute: runs one step.
        overlap: in a thread of its own, so that the caller may plan the next step meanwhile.
    """

    def __init__(self, compute: Callable[[StepPlan], StepResult], *, overlap: bool) -> None:
        self._compute = compute
        self._thread = ThreadPoolExecutor(1, "turnout-step") if overlap else None
        self._launched: deque[StepPlan | Future[StepResult]] = deque()

    @property
    def overlaps(self) -> bool:
        """Whether steps run while the caller does something else."""
        return self._thread is not None

    def launch(self, plan: StepPlan) -> None:
        """Start computing a step, after those launched before."""
        self._launched.append(plan if self._thread is None else self._thread.submit(self._compute, plan))

    def collect(self) -> StepResult:
        """The result of the oldest launched step; raises what computing it raised."""
        step = self._launched.popleft()
        return self._compute(step) if isinstance(step, StepPlan) else step.result()

    def discard(self) -> None:
        """Wait for the steps still launched and forget their results."""
        while self._launched:
            step = self._launched.popleft()
            if isinstance(step, Future):
                step.exception()

    def close(self) -> None:
        """End the thread, after what it computes now."""
        if self._thread is not None:
            self._thread.shutdown()
