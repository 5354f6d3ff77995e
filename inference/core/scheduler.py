"""The scheduling rule: every request's computed tokens catch up with its tokens under one token budget a step.

Running requests first, in the order in which they started, then waiting ones by (priority, arrival). That one rule is
chunked prefill, prefix-cache hits and resumption after preemption. Policy returns data: `schedule` gives a StepPlan,
the runner executes it, `commit` takes the sampled tokens. Between the two the step is launched, and no block that it
may touch is freed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's share of a step: compute its tokens `start` to `start + count - 1`.

    Args:
        request: read-only for the runner.
        start: position of the first token; the tokens before it are in the cache.
        count: at least 1.
        block_table: block of every `block_size` positions, at least as far as this step writes; stable until commit.
        samples: the last of these tokens is the sequence's last, so its logits give the next token.
    """

    request: Request
    start: int
    count: int
    block_table: Sequence[int]
    samples: bool

    @property
    def token_ids(self) -> list[int]:
        """The `count` tokens to compute."""
        return self.request.token_ids[self.start : self.start + self.count]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, to be executed and then committed; nothing to do is a plan of 0 tokens, which is committed as well.

    Args:
        scheduled: in batch order, every request at most once.
        num_tokens: sum of their counts, at most the budget.
        preempted: requests that lost their blocks and wait again.
        expired: requests that waited longer than `queue_timeout` and finished as "abort" (HTTP 503).
    """

    scheduled: tuple[Scheduled, ...]
    num_tokens: int
    preempted: tuple[Request, ...]
    expired: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges and counters since start.

    Args:
        running: requests with blocks.
        waiting: queued requests, the preempted ones included.
        usage: referenced / usable blocks, 0 when idle.
        preemptions: how often a request lost its blocks.
        prefix_queries: prompt tokens looked up in the prefix cache, once a request.
        prefix_hits: those of them that were found.
    """

    running: int
    waiting: int
    usage: float
    preemptions: int
    prefix_queries: int
    prefix_hits: int
