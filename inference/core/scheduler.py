"""The scheduling rule: every request's computed tokens catch up with its tokens under one token budget a step.

Running requests first, in the order in which they started, then waiting ones by (priority, arrival). That one rule is
chunked prefill, prefix-cache hits and resumption after preemption. An encoder's input is computed whole, in the step
in which its request starts, under the same budget. Policy returns data: `schedule` gives a StepPlan, the runner
executes it, `commit` takes the sampled tokens. Between the two the step is launched, and no block that it may touch is
freed.
"""

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from ... import RequestError
from ..config import EngineConfig
from .blocks import BlockManager
from .request import FinishReason, QueueFullError, Request, Status

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's share of a step: compute its tokens `start` to `start + count - 1`.

    Args:
        request: read-only for the runner.
        start: position of the first token; the tokens before it are in the cache.
        count: at least 1.
        block_table: block of every `block_size` positions, at least as far as this step writes; stable until commit.
        samples: the last of these tokens is the sequence's last, so its logits give the next token.
        memory_table: block of every `block_size` encoder tokens; empty without an encoder.
        encoded: encoder tokens to compute before these: all of the request's, or 0.
    """

    request: Request
    start: int
    count: int
    block_table: Sequence[int]
    samples: bool
    memory_table: Sequence[int] = ()
    encoded: int = 0

    @property
    def cost(self) -> int:
        """Tokens of the budget."""
        return self.count + self.encoded

    @property
    def token_ids(self) -> list[int]:
        """The `count` tokens to compute."""
        return self.request.token_ids[self.start : self.start + self.count]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, to be executed and then committed; nothing to do is a plan of 0 tokens, which is committed as well.

    Args:
        scheduled: in batch order, every request at most once.
        num_tokens: sum of their costs, at most the budget.
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


@dataclass(slots=True)
class _Draft:
    """A plan under construction."""

    budget: int
    scheduled: dict[str, Scheduled] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)

    def give(self, request: Request) -> None:
        """Schedule as many of the request's missing tokens as the budget allows."""
        start, missing = request.num_computed_tokens, len(request.token_ids) - request.num_computed_tokens
        encoded = request.num_unencoded_tokens
        count = min(missing, self.budget - encoded)
        item = Scheduled(request, start, count, request.block_table, count == missing, request.memory_table, encoded)
        self.budget -= item.cost
        self.scheduled[request.id] = item

    def take_back(self, request: Request) -> None:
        """Unschedule a request; nothing is launched yet."""
        item = self.scheduled.pop(request.id, None)
        if item is not None:
            self.budget += item.cost


class Scheduler:
    """Owns every live request; single-threaded; the same calls give the same plans.

    A request finishes exactly once: in `commit` (its last token), by `finish` or `abort`, or by expiring in the queue.

    Args:
        config: limits; `max_model_len` None means whatever fits the pool.
        blocks: the KV cache's blocks, used by this scheduler alone.
        clock: seconds, the same clock as `Request.arrival`; read only when `queue_timeout` is set.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, clock: Callable[[], float]) -> None:
        self.config = config
        self.blocks = blocks
        self.requests: dict[str, Request] = {}
        """All live requests by id, in the order of their arrival."""
        self.running: list[Request] = []
        """In the order in which they started. All but the last have one token to compute: a prefill that does not fit
        the budget uses it up, and nothing starts behind it. So no decode ever waits for a prefill."""
        self.waiting: list[Request] = []
        """By rank; a preempted request stands before all of its class, because it came earlier."""
        self._clock = clock
        self._launched: StepPlan | None = None
        self._arrivals = 0
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def add(self, *requests: Request) -> None:
        """Queue requests, all of them or none.

        Raises:
            RequestError: a request that could never run; both numbers are named.
            QueueFullError: they would make more than `max_waiting`.
        """
        limits = [self._max_tokens(request) for request in requests]
        ids = [request.id for request in requests]
        for i, name in enumerate(ids):
            if name in self.requests or name in ids[:i]:
                raise RequestError(
                    f"request_id ({name!r}) must be new among live requests: choose another", "request_id"
                )
        if len(self.waiting) + len(requests) > self.config.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests wait and {len(requests)} more would exceed max_waiting "
                f"({self.config.max_waiting}): try again later"
            )
        for request, limit in zip(requests, limits, strict=True):
            request.max_tokens = limit
            request.order = self._arrivals
            self._arrivals += 1
            self.requests[request.id] = request
            insort(self.waiting, request, key=_rank)

    def schedule(self) -> StepPlan:
        """Plan and launch the next step; exactly one `commit` must follow before the next call."""
        if self._launched is not None:
            raise RuntimeError("schedule() was called before commit() of the launched step")
        expired = self._expire()
        draft = _Draft(self.config.max_num_batched_tokens)
        for request in tuple(self.running):
            if request.status is Status.RUNNING and self._extend(request, draft):
                draft.give(request)
        self._admit(draft)
        num_tokens = self.config.max_num_batched_tokens - draft.budget
        plan = StepPlan(tuple(draft.scheduled.values()), num_tokens, tuple(draft.preempted), expired)
        for item in plan.scheduled:
            item.request.in_flight = True
        self._launched = plan
        return plan

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[Request]:
        """Take the results of the launched step.

        A request that finished after the launch has already had its last word: its late token is dropped.

        Args:
            plan: what `schedule` returned last.
            sampled: request id → next token, for every live request of the plan that `samples`.

        Returns:
            The requests that got a token, with their `finish_reason` if it was the last.
        """
        if plan is not self._launched:
            raise RuntimeError("commit() needs the plan of the launched step, once")
        self._launched = None
        advanced = []
        for item in plan.scheduled:
            request = item.request
            request.in_flight = False
            if request.status is Status.FINISHED:
                self.blocks.release(request)
                continue
            request.num_computed_tokens += item.count
            request.num_unencoded_tokens = 0
            self.blocks.publish(request)
            if item.samples:
                reason = request.append(sampled[request.id])
                if reason is not None:
                    self._retire(request, reason)
                advanced.append(request)
        return advanced

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """End a request wherever it stands; None if it is not (or no longer) known."""
        request = self.requests.get(request_id)
        if request is not None:
            self._retire(request, reason)
        return request

    def abort(self, request_id: str) -> Request | None:
        """`finish` with the reason "abort"."""
        return self.finish(request_id, "abort")

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self.running),
            waiting=len(self.waiting),
            usage=self.blocks.usage,
            preemptions=self._preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    def _max_tokens(self, request: Request) -> int:
        """How many tokens the request may generate. The last one is never computed, so it needs no slot."""
        prompt, wanted = len(request.prompt_token_ids), request.params.max_tokens
        if prompt == 0:
            raise RequestError("prompt (0 tokens) must have at least one token", "prompt")
        slots = (self.blocks.num_usable - self._memory_blocks(request)) * self.blocks.block_size
        context = self.config.max_model_len
        limit, name = slots + 1, f"the KV cache ({slots} tokens) by more than the last, uncached one"
        if context is not None and context <= limit:
            limit, name = context, f"max_model_len ({context})"
        least = max(1, request.params.min_tokens) if wanted is None else wanted
        if prompt + least > limit:
            field_name = "prompt" if prompt >= limit else "max_tokens"
            fix = "shorten the prompt or lower max_tokens"
            begin = "prompt" if request.encoder_token_ids is None else "start token"
            raise RequestError(f"{begin} ({prompt}) + max_tokens ({least}) must not exceed {name}: {fix}", field_name)
        return limit - prompt if wanted is None else wanted

    def _memory_blocks(self, request: Request) -> int:
        """Blocks for the encoder's input, of which a whole one must fit a step, beside one of the decoder's tokens."""
        if request.encoder_token_ids is None:
            return 0
        size, config = len(request.encoder_token_ids), self.config
        if size == 0:
            raise RequestError("prompt (0 tokens) must have at least one token", "prompt")
        limits = {
            "max_model_len": config.max_model_len or sys.maxsize,
            "max_num_batched_tokens - 1: the encoder reads it in one step": config.max_num_batched_tokens - 1,
            "the KV cache without one block, the decoder's": (self.blocks.num_usable - 1) * self.blocks.block_size,
        }
        for name, limit in limits.items():
            if size > limit:
                rule = f"must not exceed {limit} ({name}): shorten it or raise that"
                raise RequestError(f"prompt ({size} tokens, the encoder's input) {rule}", "prompt")
        return self.blocks.spanned(size)

    def _expire(self) -> tuple[Request, ...]:
        timeout = self.config.queue_timeout
        if timeout is None:
            return ()
        now, expired = self._clock(), []
        for request in self.requests.values():
            if request.status is Status.WAITING:
                if now - request.arrival < timeout:
                    break
                expired.append(request)
        for request in expired:
            self._retire(request, "abort")
        return tuple(expired)

    def _extend(self, request: Request, draft: _Draft) -> bool:
        """Find blocks for a running request, at the cost of the lowest ranks; False = it was the lowest itself."""
        while not self.blocks.extend(request):
            victim = max(self.running, key=_rank)
            self._preempt(victim, draft)
            if victim is request:
                return False
        return True

    def _admit(self, draft: _Draft) -> None:
        """Start waiting requests in order of rank while budget, seats and blocks last; nobody overtakes the head."""
        while self.waiting and draft.budget:
            request = self.waiting[0]
            if request in draft.preempted or not self._make_room(request, draft):
                break
            del self.waiting[0]
            self.running.append(request)
            request.status = Status.RUNNING
            if request.num_preemptions == 0:
                request.num_cached_tokens = request.num_computed_tokens
                self._prefix_hits += request.num_computed_tokens
                self._prefix_queries += request.num_tokens
            draft.give(request)

    def _make_room(self, request: Request, draft: _Draft) -> bool:
        """Give a waiting request what it needs to start, if need be at the cost of running ones of lower priority."""
        while not self._start(request, draft):
            victim = max(self.running, key=_rank, default=None)
            if victim is None or victim.priority <= request.priority:
                return False
            self._preempt(victim, draft)
        return True

    def _start(self, request: Request, draft: _Draft) -> bool:
        """Find a seat, a share of the budget for its encoder's whole input and one token, and its blocks."""
        seated = len(self.running) < self.config.max_num_seqs
        return seated and self.blocks.to_encode(request) < draft.budget and self.blocks.start(request)

    def _preempt(self, victim: Request, draft: _Draft) -> None:
        draft.take_back(victim)
        draft.preempted.append(victim)
        self.running.remove(victim)
        self.blocks.release(victim)
        victim.status = Status.PREEMPTED
        victim.num_preemptions += 1
        self._preemptions += 1
        insort(self.waiting, victim, key=_rank)

    def _retire(self, request: Request, reason: FinishReason) -> None:
        del self.requests[request.id]
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            del self.waiting[bisect_left(self.waiting, request.rank, key=_rank)]
        request.status = Status.FINISHED
        request.finish_reason = reason
        if not request.in_flight:
            self.blocks.release(request)
