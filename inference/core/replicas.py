"""One scheduler for each replica of the model, seen as one: every rank of a replica computes its part of a step.

A request goes, with all its choices, where it would be finished first: to the replica with the least work left, its own
included, and that is less where a prefix of it is cached. Every step has a part for every replica, also one of 0
tokens: all ranks compute every step together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from .request import FinishReason, QueueFullError, Request
from .scheduler import Scheduler, SchedulerStats
from .step import StepPlan


@dataclass(frozen=True, slots=True)
class JointPlan(StepPlan):
    """The parts of one step, by replica, and what they are together.

    Args:
        parts: one a replica.
    """

    parts: tuple[StepPlan, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[StepPlan]) -> "JointPlan":
        return cls(
            scheduled=tuple(item for part in parts for item in part.scheduled),
            num_tokens=sum(part.num_tokens for part in parts),
            preempted=tuple(request for part in parts for request in part.preempted),
            expired=tuple(request for part in parts for request in part.expired),
            parts=tuple(parts),
        )


NOTHING = StepPlan((), 0, (), ())
"""The part of a replica that plans nothing, and to which nothing is to be committed."""


class Replicas:
    """The methods of a `Scheduler`, over several; single-threaded.

    Args:
        schedulers: one a replica, each with its own blocks and alike in their configuration. `max_waiting` is of all of
            them together, the other limits of each.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self.schedulers = tuple(schedulers)
        self._launched = [0] * len(self.schedulers)

    def add(self, *requests: Request, held: bool = False) -> None:
        """As `Scheduler.add`; all requests of one call go to one replica."""
        limit, waiting = self.schedulers[0].config.max_waiting, self.stats().waiting
        if waiting + len(requests) > limit:
            raise QueueFullError(
                f"{waiting} requests wait and {len(requests)} more would exceed max_waiting ({limit}): try again later"
            )
        self._best(requests[0]).add(*requests, held=held)

    def release(self, request_id: str) -> None:
        """As `Scheduler.release`."""
        for scheduler in self.schedulers:
            scheduler.release(request_id)

    @property
    def patience(self) -> float:
        """As `Scheduler.patience`."""
        return min(scheduler.patience for scheduler in self.schedulers)

    def schedule(self) -> JointPlan:
        """As `Scheduler.schedule`."""
        self._launched = [1] * len(self.schedulers)
        return JointPlan.of([scheduler.schedule() for scheduler in self.schedulers])

    def schedule_ahead(self) -> JointPlan | None:
        """As `Scheduler.schedule_ahead`; a replica that can not look ahead has nothing in this step."""
        parts = [
            (scheduler.schedule_ahead() if launched else scheduler.schedule() if scheduler.requests else None)
            or NOTHING
            for scheduler, launched in zip(self.schedulers, self._launched, strict=True)
        ]
        self._launched = [n + (part is not NOTHING) for n, part in zip(self._launched, parts, strict=True)]
        return None if all(part is NOTHING for part in parts) else JointPlan.of(parts)

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[Request]:
        """As `Scheduler.commit`."""
        assert isinstance(plan, JointPlan), "a plan of these replicas"
        parts = list(zip(self.schedulers, plan.parts, strict=True))
        self._launched = [n - (part is not NOTHING) for n, (_, part) in zip(self._launched, parts, strict=True)]
        return [
            request for scheduler, part in parts if part is not NOTHING for request in scheduler.commit(part, sampled)
        ]

    def discard(self) -> list[Request]:
        """As `Scheduler.discard`."""
        self._launched = [0] * len(self.schedulers)
        return [request for scheduler in self.schedulers for request in scheduler.discard()]

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """As `Scheduler.finish`."""
        ended = (scheduler.finish(request_id, reason) for scheduler in self.schedulers)
        return next((request for request in ended if request is not None), None)

    def abort(self, request_id: str) -> Request | None:
        """As `Scheduler.abort`."""
        return self.finish(request_id, "abort")

    def stats(self) -> SchedulerStats:
        """Sums over the replicas; shares are means, for their pools are of one size."""
        every = [scheduler.stats() for scheduler in self.schedulers]
        sums = {each.name: sum(getattr(stats, each.name) for stats in every) for each in fields(SchedulerStats)}
        return SchedulerStats(**(sums | {share: sums[share] / len(every) for share in ("usage", "kv_utilisation")}))

    def _best(self, request: Request) -> Scheduler:
        """The replica that would be done with the request first, as far as tokens tell; the first of equals.

        What a request asks for besides tokens is told by the rank that computes it, so that goes to rank 0's.
        """
        if request.params.routed_experts or request.params.prompt_logprobs is not None:
            return self.schedulers[0]

        def left(scheduler: Scheduler) -> int:
            if request.id in scheduler.requests:
                return -1  # which will refuse it
            own = len(request.prompt_token_ids) - scheduler.blocks.cached_tokens(request)
            return own + sum(map(_work, scheduler.requests.values()))

        return min(self.schedulers, key=left)


def _work(request: Request) -> int:
    """Tokens to be computed until it has ended, if it ends by its length."""
    return request.num_tokens - request.num_computed_tokens + request.max_tokens - request.num_output_tokens
