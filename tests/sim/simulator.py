"""A simulated server: arrivals, aborts, stops, failed steps and a shrinking pool by seed around a real scheduler, with
every invariant checked.

Nothing here knows how the scheduler decides; it knows what must hold whatever it decides. Replay a seed with
`Simulation(seed).run()`. With `encoder`, every prompt is an encoder's input and the decoder begins with one token.
"""

import math
import random
from collections import Counter, deque
from collections.abc import Callable

from turnout import RequestError
from turnout.inference.core.blocks import BlockManager, ContiguousBlocks
from turnout.inference.core.request import Request, Status
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.scheduler import Scheduler
from turnout.inference.core.step import Scheduled, StepPlan

from .doubles import EOS, MODEL, CanaryCache, FakeClock
from .invariants import PrefixWatch, check_blocks, check_drained, check_memories, check_plan
from .settings import draw_config, refusal

SALTS = ("", "tenant")
START = 0


class Simulation:
    """One seed's server.

    Args:
        seed: decides everything.
        scheduler, blocks: the classes under test; mutants are passed here.
        encoder: serve an encoder-decoder.
    """

    def __init__(
        self,
        seed: int,
        scheduler: type[Scheduler] = Scheduler,
        blocks: type[BlockManager] = BlockManager,
        encoder: bool = False,
    ) -> None:
        self.encoder = encoder
        self.random = random.Random(seed)
        self.config = draw_config(self.random, encoder)
        self.clock = FakeClock()
        size, pool = self.config.block_size, self.config.num_blocks or 2
        if self.config.kv_layout == "contiguous":
            manager: BlockManager = ContiguousBlocks(pool, size, longest=self.config.max_model_len or 1)
        else:
            manager = blocks(pool, size, enable_prefix_caching=self.config.enable_prefix_caching)
        self.scheduler = scheduler(self.config, manager, self.clock)
        self.cache = CanaryCache(pool, size)
        self.watch = PrefixWatch()
        self.roots: set[int] = set()
        self.prompts: list[tuple[int, ...]] = []
        self.requests: list[Request] = []
        self.ended: dict[Request, tuple[int, ...]] = {}
        """Finished requests and the tokens that they had then."""
        self.streamed: dict[Request, list[int]] = {}
        """What the clients received, token by token."""
        self.natural: set[Request] = set()
        """Those that ended by themselves."""
        self.alphabet = self.random.choice((2, 3))
        self.abort_rate = self.random.choice((0.0, 0.05, 0.3))
        self.stop_rate = self.random.choice((0.0, 0.05))
        self.burst = self.random.choice((1, 2, 6))
        self.ahead_rate = self.random.choice((0.0, 0.5, 1.0))
        self.failure_rate = self.random.choice((0.0, 0.0, 0.05))
        self.taken: list[int] = []
        """Blocks that somebody else has taken from the pool for a while."""
        self.delayed: set[Request] = set()
        """Requests that were held."""
        self.launched: deque[StepPlan] = deque()
        self.newest: dict[str, int] = {}
        """What the last executed step sampled."""
        self.formed = -1
        """The last arrival when the batch that runs was formed."""
        self.wasted = 0
        """Tokens to compute again after failed steps."""
        self.to_arrive = self.random.randint(1, 80)
        self.trace: list[tuple[str, int, int]] = []
        """Everything scheduled: request, first token, count."""
        self.seen: Counter[str] = Counter()
        """How often each situation came up; the tests want all of them."""

    def run(self) -> None:
        steps = 0
        while self.to_arrive > 0 or self.scheduler.requests or self.launched or self.taken:
            if self.to_arrive > 0 and self.random.random() < 0.4:
                for _ in range(self.random.randint(1, self.burst)):
                    self._arrive()
            self.step()
            steps += 1
            work = sum(len(r.prompt_token_ids) + r.max_tokens for r in self.requests) + self.wasted
            assert steps <= 400 + work, "P2 the best-ranked request progresses in every step"
        check_drained(self.scheduler)
        self._check_outputs()
        stats = self.scheduler.stats()
        self.seen.update(preempted=stats.preemptions, hit=stats.prefix_hits, steps=steps)
        assert stats.preemptions == sum(request.num_preemptions for request in self.requests)
        assert stats.prefix_hits == sum(request.num_cached_tokens for request in self.requests)

    def step(self) -> None:
        """Everything that one turn of a server's loop can meet."""
        self.clock.now += 1.0
        self._abort_some("abort between steps")
        self._release_some()
        self._shrink()
        if not self.launched:
            self._plan(self.scheduler.schedule, going=None)
        if self.random.random() < self.ahead_rate:
            going = [request for request in self.scheduler.running if request.continues]
            self._plan(self.scheduler.schedule_ahead, going=going)
        self._abort_some("abort during a step")
        if self.to_arrive > 0 and self.random.random() < 0.1:
            self._arrive()
        self._check_blocks()
        if self.launched[0].scheduled and self.random.random() < self.failure_rate:
            self._fail()
        else:
            plan = self.launched.popleft()
            self._commit(plan, self._execute(plan))
        self._check_blocks()
        self.watch.check(self.scheduler, self.cache, self.roots)

    def _plan(self, schedule: Callable[[], StepPlan | None], going: list[Request] | None) -> None:
        """Launch a step, or one ahead of another, and check it."""
        fresh = {request for request in self.scheduler.requests.values() if request.status is not Status.RUNNING}
        made = {MODEL.root(request) for request in (*self.scheduler.running, *self._late()) if request.memory_table}
        plan = schedule()
        if plan is None:
            return
        self.launched.append(plan)
        self.seen["ahead"] += going is not None
        for request in plan.expired:
            self.seen["expired"] += 1
            self._end(request)
        self.trace.extend((item.request.id, item.start, item.count) for item in plan.scheduled)
        check_plan(self.scheduler, plan, going=going, short=bool(self.taken), delayed=self.delayed)
        self._check_start(plan, fresh, going)
        self._check_hits(plan, fresh)
        check_memories(plan, fresh, made if self.config.enable_prefix_caching else None)

    def _check_start(self, plan: StepPlan, fresh: set[Request], going: list[Request] | None) -> None:
        """Nobody joins a batch that runs, and nobody waits past a deadline."""
        others = [item for item in plan.scheduled if item.request not in fresh]
        if not others and not going:
            self.formed = max((request.order for request in fresh), default=-1)
        if self.config.batching != "continuous":
            for item in plan.scheduled:
                assert item.request.order <= self.formed, "a batch is admitted whole, and nothing else until it ends"
        now, timeout = self.clock.now, self.config.queue_timeout or math.inf
        for request in (*self.scheduler.waiting, *self.scheduler.held.values()):
            if going is None and request.num_preemptions == 0:
                assert now < min(request.arrival + timeout, request.deadline or math.inf), "P10 a deadline ends waiting"

    def _check_blocks(self) -> None:
        check_blocks(self.scheduler, self._late(), self.taken)
        for plan in self.launched:
            for item in plan.scheduled:
                counts = [self.scheduler.blocks.counts[block] for block in (*item.block_table, *item.memory_table)]
                assert all(counts), "I7 a launched step's blocks are kept"

    def _late(self) -> set[Request]:
        """Finished requests whose step is still launched."""
        return {item.request for plan in self.launched for item in plan.scheduled if item.request in self.ended}

    def _release_some(self) -> None:
        """Whoever held a request lets it go, sooner or later."""
        for request in list(self.scheduler.held.values()):
            if self.random.random() < 0.3:
                self.scheduler.release(request.id)
                self.seen["released"] += request.status is Status.WAITING

    def _shrink(self) -> None:
        """Somebody takes blocks from the pool for a while."""
        blocks = self.scheduler.blocks
        if self.taken and self.random.random() < 0.3:
            while self.taken:
                blocks._drop(self.taken.pop())
        elif not self.taken and blocks.shares and self.to_arrive > 0 and self.random.random() < 0.02:
            self.taken = [blocks._take() for _ in range(self.random.randint(0, blocks.num_available))]
            self.wasted += 40
            self.seen["shrunk"] += 1

    def _fail(self) -> None:
        """The launched steps leave rubbish in the cache, and nothing else."""
        self.seen["failed"] += 1
        for plan in self.launched:
            for item in plan.scheduled:
                self.cache.spoil(item)
                self.wasted += item.request.num_tokens + 1
        live = {item.request for plan in self.launched for item in plan.scheduled if item.request not in self.ended}
        assert set(self.scheduler.discard()) == live, "the live requests of a failed step are suspects"
        assert all(request.suspect for request in live)
        assert not self.scheduler.running
        self.launched.clear()

    def _length(self) -> int:
        """A length at, just below or just above a block boundary, mostly so that two of them fit the pool."""
        most = min(((self.config.num_blocks or 2) + self.random.choice((0, 0, 0, 1))) // 2, 6)
        return max(1, self.random.randint(0, most) * self.config.block_size + self.random.choice((-1, 0, 1)))

    def _prompt(self) -> tuple[int, ...]:
        prompt = [self.random.randrange(self.alphabet) for _ in range(self._length())]
        if self.prompts and self.random.random() < 0.6:
            shared = self.random.choice(self.prompts)
            prompt = [*shared[: self._length()], *prompt][: max(len(prompt), 1)]
        self.prompts.append(tuple(prompt))
        return self.prompts[-1]

    def _arrive(self) -> None:
        """One prompt with one to three choices, with live or used-up ids, perhaps one that can not be served."""
        self.to_arrive -= 1
        prompt, max_tokens = self._prompt(), self._length()
        source: tuple[int, ...] | None = None
        if self.encoder:
            source = self.random.choice(self.prompts) if self.random.random() < 0.3 else prompt
            prompt = (START,)
        if scores := self.random.random() < 0.05:
            max_tokens = 0
        params = SamplingParams(
            max_tokens=max_tokens,
            prompt_logprobs=0 if scores else None,
            min_tokens=self.random.choice((0, 0, max_tokens // 2)),
            ignore_eos=self.random.random() < 0.7,
            stop_token_ids=self.random.choice(((), (), (3,))),
        )
        name = f"request {self.random.randrange(40)}"
        priority, salt = self.random.choice((0, 0, 0, 1, -1)), self.random.choice((*SALTS, ""))
        deadline = self.random.choice((None, None, None, self.clock.now + 20))
        group: list[Request] = []
        for i in range(self.random.choice((1, 1, 1, 3))):
            parent = group[0] if group and self.scheduler.blocks.shares and not source else None
            request = Request(f"{name}/{i}", prompt, params, self.clock.now, priority, EOS, i, salt, source)
            request.deadline, request.parent = deadline, parent
            group.append(request)
        held = self.random.random() < 0.1
        expected = refusal(self.scheduler, group)
        before = dict(self.scheduler.requests)
        outcome: type[RequestError] | None = None
        try:
            self.scheduler.add(*group, held=held)
        except RequestError as error:
            outcome = type(error)
        assert outcome is expected, f"P8 expected {expected}, got {outcome}"
        if outcome is None:
            self.requests.extend(group)
            self.delayed.update(request for request in group if request.status is Status.HELD)
            self.roots.add(MODEL.root(group[0]))
        else:
            assert self.scheduler.requests == before, "I2 a refused request leaves nothing"
            self.seen[f"refused {outcome.__name__}"] += 1

    def _abort_some(self, situation: str) -> list[Request]:
        """Abort any live request, twice, and an unknown one; returns the aborted."""
        aborted = []
        if self.random.random() < self.abort_rate and self.scheduler.requests:
            request = self.random.choice(list(self.scheduler.requests.values()))
            self.seen[f"{situation}: {request.status.value}"] += 1
            assert self.scheduler.abort(request.id) is request
            assert self.scheduler.abort(request.id) is None, "an id is aborted once"
            assert self.scheduler.abort("nobody") is None
            self._end(request)
            aborted.append(request)
        return aborted

    def _check_hits(self, plan: StepPlan, fresh: set[Request]) -> None:
        for item in plan.scheduled:
            self.seen["chunked"] += not item.samples
            self.seen["memory shared"] += bool(item.memory_table) and item.request in fresh and not item.encoded
            self.seen["encoded again"] += item.encoded > 0 and item.request.num_preemptions > 0
            if item.request in fresh:
                reads, parent = item.request.params.reads_prefix, item.request.parent
                hit = self.watch.longest_hit(self.scheduler, item.request) if reads else 0
                prompt, known = len(item.request.prompt_token_ids), item.request.num_tokens
                if parent and any(parent.block_table[:1]) and parent.num_computed_tokens >= prompt == known:
                    hit = prompt - 1
                    self.seen["forked"] += 1
                    self.seen["copied"] += item.copied is not None
                assert item.start == hit, "I5 the longest cached prefix is used, less at least one token"

    def _execute(self, plan: StepPlan) -> dict[str, int]:
        """The model's step: all earlier tokens are read first, then all new ones are written, then read back."""
        for source, target in plan.copies:
            assert self.scheduler.blocks.counts[target] == 1, "I8 a copy has one owner"
            self.cache.copy(source, target)
        for item in plan.scheduled:
            self._read(item, item.start)
        memory = [slot for item in plan.scheduled for slot in self.cache.write_memory(MODEL, item)]
        for item in plan.scheduled:
            assert self.cache.read_memory(item) == MODEL.memory(item.request), "canary: a memory is not of this input"
        written = [slot for item in plan.scheduled for slot in self.cache.write(MODEL, item, self._tokens(item))]
        assert len({*memory, *written}) == len(memory) + len(written), "I9 no two tokens in one slot"
        for slot in written:
            block = slot // self.config.block_size
            assert block != 0, "I9 the null block takes padding only"
            assert self.scheduler.blocks.counts[block] == 1, "I7 a launched step writes only blocks that it owns"
        sampled = {}
        for item in plan.scheduled:
            values = self._read(item, item.end)
            if item.samples:
                sampled[item.request.id] = MODEL.next_token(values[-1], item.request.choice)
        self.newest = sampled
        return sampled

    def _tokens(self, item: Scheduled) -> list[int]:
        """The request's tokens up to the item's end, as the model's runner knows them."""
        known = [*item.request.token_ids[: item.start], *item.token_ids]
        return known if len(known) == item.end else [*known, self.newest[item.request.id]]

    def _read(self, item: Scheduled, end: int) -> list[int]:
        values = MODEL.values(item.request, self._tokens(item))[:end]
        assert self.cache.read(item, end) == values, "canary: a slot does not hold what was computed for it"
        return values

    def _commit(self, plan: StepPlan, sampled: dict[str, int]) -> None:
        live = [
            item.request
            for item in plan.scheduled
            if (item.samples or (item.request.max_tokens == 0 and item.end == item.request.num_tokens))
            and item.request not in self.ended
        ]
        advanced = self.scheduler.commit(plan, sampled)
        assert advanced == live, "P5 a late output is dropped, every other one is applied"
        for request in advanced:
            streamed = self.streamed.setdefault(request, [])
            self.seen["scored"] += request.max_tokens == 0
            streamed += request.token_ids[-1:] if request.max_tokens else []
            assert request.output_token_ids == streamed, "P3 every token is streamed exactly once"
            if request.finish_reason is not None:
                self.natural.add(request)
                self._end(request)
            elif self.random.random() < self.stop_rate:
                self.seen["stop string"] += 1
                assert self.scheduler.finish(request.id, "stop") is request
                self._end(request)

    def _end(self, request: Request) -> None:
        assert request not in self.ended, "O2 exactly one end"
        assert request.status is Status.FINISHED, "O2 an ended request is finished"
        assert request.finish_reason is not None, "O2 with a reason"
        self.ended[request] = tuple(request.output_token_ids)

    def _check_outputs(self) -> None:
        """Every request's tokens are those that it would have got alone."""
        assert self.ended.keys() == set(self.requests), "O2 every request ends"
        for request in self.requests:
            output = request.output_token_ids
            assert tuple(output) == self.ended[request], "P5 nothing is appended after the end"
            expected, reason = MODEL.complete(request)
            if request in self.natural:
                assert (output, request.finish_reason) == (expected, reason), "P3 the oracle's tokens"
            else:
                assert output == expected[: len(output)], "P3 a prefix of the oracle's tokens"
