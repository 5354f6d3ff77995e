"""The scheduling rule: every request's computed tokens catch up with its tokens under one token budget a step.

Running requests first, in the order in which they started, then waiting ones by (priority, arrival). That one rule is
chunked prefill, prefix-cache hits and resumption after preemption. An encoder's input is computed whole, in the step
in which its request starts, under the same budget. Policy returns data: `schedule` gives a StepPlan, the runner
executes it, `commit` takes the sampled tokens. Between the two the step is launched, and no block that it may touch is
freed. While it runs, `schedule_ahead` plans the next one where that needs no token that is not known yet.

Static and dynamic batching are other rules of admission (`admission.py`) for the same steps.
"""

import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from ... import RequestError
from ..config import EngineConfig
from .admission import Admission
from .blocks import BlockManager
from .deadlines import Deadlines
from .request import FinishReason, QueueFullError, Request, Status
from .step import Draft, StepPlan

_rank = attrgetter("rank")
CALLER = ""
"""Who holds a request until `release`; no request has this id."""


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Gauges and counters since start.

    Args:
        running: requests with blocks.
        waiting: queued requests, the held and the preempted ones included.
        usage: referenced / usable blocks, 0 when idle.
        kv_utilisation: filled slots / slots of the referenced blocks, 0 when idle.
        preemptions: how often a request lost its blocks.
        prefix_queries: prompt tokens looked up in the prefix cache, once a request.
        prefix_hits: those of them that were found.
    """

    running: int
    waiting: int
    usage: float
    kv_utilisation: float
    preemptions: int
    prefix_queries: int
    prefix_hits: int


class Scheduler:
    """Owns every live request; single-threaded; the same calls give the same plans.

    A request finishes exactly once: in `commit` (its last token), by `finish` or `abort`, or by expiring in the queue.

    Args:
        config: limits; `max_model_len` None means whatever fits the pool.
        blocks: the KV cache's blocks, used by this scheduler alone.
        clock: seconds, the same clock as `Request.arrival`; read once for each request that starts, and where a
            deadline or a window is set.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, clock: Callable[[], float]) -> None:
        self.config = config
        self.blocks = blocks
        self._clock = clock
        self.requests: dict[str, Request] = {}
        """All live requests by id, in the order of their arrival."""
        self.running: list[Request] = []
        """In the order in which they started. All but the last have one token to compute: a prefill that does not fit
        the budget uses it up, and nothing starts behind it. So no decode ever waits for a prefill."""
        self.waiting: list[Request] = []
        """By rank; a preempted request stands before all of its class, because it came earlier."""
        self.held: dict[str, Request] = {}
        """Requests that may not start yet; they stand in nobody's way."""
        self._admission = Admission(config, clock)
        self._deadlines = Deadlines(config.queue_timeout, clock)
        self._launched: deque[StepPlan] = deque()
        self._arrivals = 0
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    def add(self, *requests: Request, held: bool = False) -> None:
        """Queue requests, all of them or none. One with a parent starts when the parent's prompt is computed.

        Args:
            held: they may not start before `release`.

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
        waiting = len(self.waiting) + len(self.held)
        if waiting + len(requests) > self.config.max_waiting:
            raise QueueFullError(
                f"{waiting} requests wait and {len(requests)} more would exceed max_waiting "
                f"({self.config.max_waiting}): try again later"
            )
        for request, limit in zip(requests, limits, strict=True):
            request.max_tokens = limit
            request.order = self._arrivals
            self._arrivals += 1
            self.requests[request.id] = request
            self._deadlines.add(request)
            if held:
                request.held_by.add(CALLER)
            if request.parent is not None and request.parent.id in self.requests:
                request.held_by.add(request.parent.id)
            if request.held_by:
                request.status = Status.HELD
                self.held[request.id] = request
            else:
                insort(self.waiting, request, key=_rank)

    def release(self, request_id: str) -> None:
        """Let a held request start, as far as its caller is concerned; without effect when it has ended."""
        if request_id in self.held:
            self._free(self.held[request_id], CALLER)

    @property
    def patience(self) -> float:
        """Seconds until there may be something to schedule, if there is nothing now and nothing else happens."""
        return self._admission.patience(self.waiting)

    def schedule(self) -> StepPlan:
        """Plan and launch the next step, when none is launched; exactly one `commit` must follow."""
        if self._launched:
            raise RuntimeError("schedule() was called before commit() of the launched step")
        expired, draft = self._expire(), self._draft()
        for request in tuple(self.running):
            if request.status is Status.RUNNING and self._extend(request, draft):
                draft.give(request)
        self._admit(draft)
        return self._launch(draft, expired)

    def schedule_ahead(self) -> StepPlan | None:
        """Plan and launch the step after the launched one, which is to be committed first.

        None when that would need what only the launched step's commit can give: the value of a token, or room at the
        cost of a running request; or when there is nothing to do. A request that may end by the token that is sampled
        now is computed on; if it ends, that is dropped.
        """
        going = [request for request in self.running if request.continues]
        if len(self._launched) != 1 or any(r.num_pending_tokens and r.params.needs_history for r in going):
            return None
        draft = self._draft()
        for request in going:
            if not self.blocks.extend(request):
                return None
            draft.give(request)
        self._admission.form(self.waiting, self.running)
        first = self._admission.first(self.waiting)
        if first is not None and self._outranks(first):
            return None
        self._admit(draft)
        return self._launch(draft, ()) if draft.scheduled else None

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[Request]:
        """Take the results of the launched step.

        A request that finished after the launch has already had its last word: its late token is dropped.

        Args:
            plan: what `schedule` returned last.
            sampled: request id → next token, for every live request of the plan that `samples`.

        Returns:
            The requests that got a token, with their `finish_reason` if it was the last; and those that want none,
            when their prompt is computed.
        """
        if not self._launched or plan is not self._launched[0]:
            raise RuntimeError("commit() needs the plan of the launched step, once")
        self._launched.popleft()
        advanced = []
        for item in plan.scheduled:
            request = item.request
            request.in_flight -= 1
            if request.status is Status.FINISHED:
                if not request.in_flight:
                    self.blocks.release(request)
                continue
            request.num_computed_tokens += item.count
            request.suspect = request.suspect and not item.samples
            self.blocks.publish(request)
            self.blocks.drop_passed(request)
            if item.samples:
                request.num_pending_tokens -= 1
                reason = request.append(sampled[request.id])
                if reason is not None:
                    self._retire(request, reason)
                advanced.append(request)
            elif not request.max_tokens and request.num_computed_tokens == request.num_tokens:
                self._retire(request, "length")
                advanced.append(request)
            if request.num_computed_tokens >= len(request.prompt_token_ids):
                self._free_children(request)
        return advanced

    def discard(self) -> list[Request]:
        """Forget the launched steps, of which one has failed, so that nothing that they computed is to be trusted.

        Returns:
            Their live requests, which wait again as after preemption and are suspects now.
        """
        items = [item for plan in self._launched for item in plan.scheduled]
        self._launched.clear()
        for item in items:
            item.request.in_flight = 0
        failed = list(dict.fromkeys([*(item.request for item in items), *self.running]))
        for request in failed:
            if request.status is Status.FINISHED:
                self.blocks.release(request)
            else:
                request.suspect, request.num_pending_tokens = True, 0
                self._preempt(request, self._draft())
        return [request for request in failed if request.status is not Status.FINISHED]

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
            waiting=len(self.waiting) + len(self.held),
            usage=self.blocks.usage,
            kv_utilisation=self.blocks.utilisation(self._holders()),
            preemptions=self._preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    def _holders(self) -> list[Request]:
        """Requests with blocks: the running ones, and those that have finished while their step is launched."""
        launched = {item.request for plan in self._launched for item in plan.scheduled}
        return [*self.running, *(request for request in launched if request.status is Status.FINISHED)]

    def _max_tokens(self, request: Request) -> int:
        """How many tokens the request may generate. The last one is never computed, so it needs no slot."""
        prompt, wanted = len(request.prompt_token_ids), request.params.max_tokens
        if prompt == 0:
            raise RequestError("prompt (0 tokens) must have at least one token", "prompt")
        slots = (self.blocks.num_usable - self._memory_blocks(request)) * self.blocks.block_size
        context = self.config.max_model_len
        limit, name = slots + (wanted != 0), f"the KV cache ({slots} tokens) by more than the last, uncached one"
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

    def _draft(self) -> Draft:
        return Draft(self.config.max_num_batched_tokens, self.blocks.block_size)

    def _launch(self, draft: Draft, expired: tuple[Request, ...]) -> StepPlan:
        num_tokens = self.config.max_num_batched_tokens - draft.budget
        plan = StepPlan(tuple(draft.scheduled.values()), num_tokens, tuple(draft.preempted), expired)
        for item in plan.scheduled:
            request = item.request
            request.in_flight += 1
            request.num_launched_tokens += item.count
            request.num_pending_tokens += item.samples
            request.num_unencoded_tokens, request.copied_block = 0, None
        self._launched.append(plan)
        return plan

    def _expire(self) -> tuple[Request, ...]:
        expired = self._deadlines.expired()
        for request in expired:
            self._retire(request, "abort")
        return expired

    def _free(self, request: Request, reason: str) -> None:
        """One thing less that a held request waits for."""
        request.held_by.discard(reason)
        if not request.held_by:
            del self.held[request.id]
            request.status = Status.WAITING
            insort(self.waiting, request, key=_rank)

    def _free_children(self, parent: Request) -> None:
        for request in [held for held in self.held.values() if parent.id in held.held_by]:
            self._free(request, parent.id)

    def _outranks(self, request: Request) -> bool:
        """Whether a waiting request is more urgent than a running one."""
        return any(request.priority < running.priority for running in self.running)

    def _extend(self, request: Request, draft: Draft) -> bool:
        """Find blocks for a running request, at the cost of the lowest ranks; False = it was the lowest itself."""
        while not self.blocks.extend(request):
            victim = max(self.running, key=_rank)
            self._preempt(victim, draft)
            if victim is request:
                return False
        return True

    def _admit(self, draft: Draft) -> None:
        """Start waiting requests in order of rank while budget, seats and blocks last; nobody overtakes the head."""
        self._admission.form(self.waiting, self.running)
        while draft.budget:
            request = self._admission.first(self.waiting)
            if request is None or request in draft.preempted or self._barred(request):
                break
            if not self._make_room(request, draft):
                break
            self.waiting.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            if request.num_preemptions == 0:
                request.started = self._clock()
                request.num_cached_tokens = request.num_computed_tokens
                self._prefix_hits += request.num_computed_tokens
                self._prefix_queries += request.num_tokens
            draft.give(request)

    def _barred(self, request: Request) -> bool:
        """Whether it has to wait, because a suspect runs alone."""
        return bool(self.running) and (request.suspect or self.running[0].suspect)

    def _make_room(self, request: Request, draft: Draft) -> bool:
        """Give a waiting request what it needs to start, if need be at the cost of running ones of lower priority."""
        while not self._start(request, draft):
            victim = max(self.running, key=_rank, default=None)
            if victim is None or victim.priority <= request.priority:
                return False
            self._preempt(victim, draft)
        return True

    def _start(self, request: Request, draft: Draft) -> bool:
        """Find a seat, a share of the budget for its encoder's whole input and one token, and its blocks."""
        seated = len(self.running) < self.config.max_num_seqs
        return seated and self.blocks.to_encode(request) < draft.budget and self.blocks.start(request)

    def _preempt(self, victim: Request, draft: Draft) -> None:
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
        elif request.status is Status.HELD:
            del self.held[request.id]
        else:
            del self.waiting[bisect_left(self.waiting, request.rank, key=_rank)]
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.num_pending_tokens = 0
        if not request.in_flight:
            self.blocks.release(request)
        self._free_children(request)
