"""Schedulers with one mistake each, of the kinds that serving engines have shipped; the simulator finds every one."""

from collections.abc import Mapping
from dataclasses import replace

from turnout.inference.core.blocks import BlockManager
from turnout.inference.core.prefix import PrefixCache
from turnout.inference.core.request import FinishReason, Request, Status
from turnout.inference.core.scheduler import Scheduler
from turnout.inference.core.step import Draft, StepPlan


class StaleHash(BlockManager):
    """An evicted block keeps its name."""

    def _take(self) -> int:
        name = None if self.free else self.prefix.hash_of[next(iter(self.prefix.idle))]
        block = super()._take()
        if name is not None:
            self.prefix.block_of[name] = block
        return block


class MissingReference(BlockManager):
    """A reused block that is already in use gains no reference."""

    def _reference(self, block: int) -> None:
        if self.counts[block] == 0:
            super()._reference(block)


class EvictReferenced(BlockManager):
    """A reused block stays in the eviction order."""

    def _reference(self, block: int) -> None:
        super()._reference(block)
        if self.counts[block] == 1:
            self.prefix.idle[block] = None


class DoubleFree(BlockManager):
    """The tail of a table is freed twice."""

    def release(self, request: Request) -> None:
        tail = request.block_table[-1:]
        super().release(request)
        self.free.extend(tail)


class OffByOneSlot(BlockManager):
    """The token that opens a new block gets no slot."""

    def _needed(self, request: Request) -> int:
        return max(1, -(-(len(request.token_ids) - 1) // self.block_size))


class PublishAtAllocation(BlockManager):
    """A prefix is published when its blocks are handed out, before they are computed."""

    def start(self, request: Request) -> bool:
        started = super().start(request)
        if started:
            computed, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens - 1
            self.publish(request)
            request.num_computed_tokens = computed
        return started


class FullHit(BlockManager):
    """A fully cached prompt leaves no token to compute."""

    def _match(self, request: Request) -> list[int]:
        names = self.prefix.hashes(request, request.num_tokens // self.block_size, self.block_size)
        hit = []
        for name in names:
            if name not in self.prefix.block_of:
                break
            hit.append(self.prefix.block_of[name])
        return hit


class HeadsFirst(BlockManager):
    """The head of a prefix is evicted before its tail."""

    def release(self, request: Request) -> None:
        request.block_table.reverse()
        super().release(request)


class KeepDuplicates(BlockManager):
    """A prefix computed twice is kept twice, the second one under the same name."""

    def publish(self, request: Request) -> None:
        full = request.num_computed_tokens // self.block_size
        names = self.prefix.hashes(request, full, self.block_size)
        for name, block in list(zip(names, request.block_table, strict=False))[request.num_published_blocks :]:
            self.prefix.insert(name, block)
        request.num_published_blocks = full


class _TokensOnly(PrefixCache):
    def hashes(self, request: Request, count: int, block_size: int) -> list[bytes]:
        blocks = (request.token_ids[i * block_size : (i + 1) * block_size] for i in range(count))
        return [repr((request.cache_salt, block)).encode() for block in blocks]


class NoParent(BlockManager):
    """A block's name forgets the prefix before it."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.prefix = _TokensOnly(b"")


class _OneRoot(PrefixCache):
    def _root_of(self, salt: str) -> bytes:
        return super()._root_of("")


class NoSalt(BlockManager):
    """Requests of different salts share prefixes."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.prefix = _OneRoot(b"")


class ZeroTokenStep(Scheduler):
    """A prompt longer than the budget is never started."""

    def _make_room(self, request: Request, draft: Draft) -> bool:
        return request.num_tokens <= self.config.max_num_batched_tokens and super()._make_room(request, draft)


class LateOutput(Scheduler):
    """A token that arrives after the abort is still appended."""

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[Request]:
        for item in plan.scheduled:
            if item.samples and item.request.status is Status.FINISHED:
                item.request.append(sampled[item.request.id])
        return super().commit(plan, sampled)


class FreedInFlight(Scheduler):
    """An abort frees the blocks that the launched step still writes."""

    def _retire(self, request: Request, reason: FinishReason) -> None:
        super()._retire(request, reason)
        self.blocks.release(request)


class HeldForEver(Scheduler):
    """An abort in the launched step never frees its blocks."""

    def _retire(self, request: Request, reason: FinishReason) -> None:
        super()._retire(request, reason)
        if request.in_flight:
            request.block_table = []


class ChunkSamples(Scheduler):
    """Every chunk of a prefill samples a token."""

    def schedule(self) -> StepPlan:
        plan = super().schedule()
        plan = replace(plan, scheduled=tuple(replace(item, samples=True) for item in plan.scheduled))
        self._launched[-1] = plan
        return plan


class OldestVictim(Scheduler):
    """The victim of preemption is whoever started first."""

    def _extend(self, request: Request, draft: Draft) -> bool:
        while not self.blocks.extend(request):
            victim = self.running[0]
            self._preempt(victim, draft)
            if victim is request:
                return False
        return True


class BackOfTheQueue(Scheduler):
    """A preempted request queues behind its whole class."""

    def _preempt(self, victim: Request, draft: Draft) -> None:
        super()._preempt(victim, draft)
        self.waiting.remove(victim)
        self.waiting.append(victim)


class LostToken(Scheduler):
    """Preemption forgets the last sampled token."""

    def _preempt(self, victim: Request, draft: Draft) -> None:
        super()._preempt(victim, draft)
        if victim.num_output_tokens:
            victim.token_ids.pop()


class PriorityIgnored(Scheduler):
    """A waiting request of higher priority gets no seat from running ones of lower priority."""

    def _make_room(self, request: Request, draft: Draft) -> bool:
        return len(self.running) < self.config.max_num_seqs and self.blocks.start(request)


class _NoInput(PrefixCache):
    def root(self, request: Request) -> bytes:
        request.root = self._root_of(request.cache_salt)
        return request.root


class NoEncoderInput(BlockManager):
    """Requests of different encoder inputs share memories and prefixes."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.prefix = _NoInput(b"")


class MemoryWithoutReference(BlockManager):
    """Who shares a memory is not counted."""

    def _remember(self, request: Request, encode: int) -> None:
        super()._remember(request, encode)
        if not encode:
            for block in request.memory_table:
                self.counts[block] -= 1


class MemoryForEver(BlockManager):
    """A request takes its memory with it."""

    def _forget(self, request: Request) -> None:
        request.memory_table = ()
        super()._forget(request)


class MemoryNameKept(BlockManager):
    """A memory is found after its last request has gone."""

    def _forget(self, request: Request) -> None:
        known = dict(self.memories)
        super()._forget(request)
        self.memories = known


class MemoryOfBefore(BlockManager):
    """A preempted request takes it that its encoder has run."""

    def _remember(self, request: Request, encode: int) -> None:
        super()._remember(request, encode)
        if request.num_preemptions:
            request.num_unencoded_tokens = 0


class EncoderIsFree(Scheduler):
    """What the encoder reads is not counted in the budget."""

    def _start(self, request: Request, draft: Draft) -> bool:
        started = super()._start(request, draft)
        draft.budget += request.num_unencoded_tokens if started else 0
        return started


class NoCopy(BlockManager):
    """A choice that takes over its parent's prompt gets no copy of the partly filled block."""

    def start(self, request: Request) -> bool:
        started = super().start(request)
        request.copied_block = None
        return started


class SharedTail(BlockManager):
    """It gets the partly filled block itself."""

    def start(self, request: Request) -> bool:
        started = super().start(request)
        if started and request.copied_block is not None:
            at = request.num_computed_tokens // self.block_size
            self._drop(request.block_table[at])
            self._reference(request.copied_block)
            request.block_table[at], request.copied_block = request.copied_block, None
        return started


class ForkTooEarly(BlockManager):
    """A parent's blocks are taken over before they are computed."""

    def _parent(self, request: Request) -> Request | None:
        parent = request.parent
        return parent if parent is not None and parent.block_table and request.num_output_tokens == 0 else None


class TableOfBefore(BlockManager):
    """A block that a launched step still reads is freed when another takes its place in the table."""

    def publish(self, request: Request) -> None:
        super().publish(request)
        while request.replaced_blocks:
            self._drop(request.replaced_blocks.pop())


class PreemptsAhead(Scheduler):
    """A step ahead takes its blocks from running requests."""

    def schedule_ahead(self) -> StepPlan | None:
        extend, self.blocks.extend = self.blocks.extend, self._by_force
        try:
            return super().schedule_ahead()
        finally:
            self.blocks.extend = extend

    def _by_force(self, request: Request) -> bool:
        extend = type(self.blocks).extend
        while not extend(self.blocks, request):
            victim = max(self.running, key=lambda other: other.rank)
            if victim is request:
                return False
            self._preempt(victim, self._draft())
        return True


class TrustsTheFailed(Scheduler):
    """A failed step counts as computed."""

    def discard(self) -> list[Request]:
        failed = [item.request for plan in self._launched for item in plan.scheduled]
        for request in failed:
            if request.status is Status.RUNNING:
                request.num_computed_tokens = request.num_launched_tokens
                self.blocks.publish(request)
        return super().discard()


class SuspectsTogether(Scheduler):
    """Suspects run side by side."""

    def _barred(self, request: Request) -> bool:
        return False


class OpenBatch(Scheduler):
    """A batch takes in whoever comes."""

    def _admit(self, draft: Draft) -> None:
        self._admission._batch += [request for request in self.waiting if request not in self._admission._batch]
        super()._admit(draft)


class NoDeadline(Scheduler):
    """Nobody looks at deadlines."""

    def _expire(self) -> tuple[Request, ...]:
        return ()


WITH_ENCODER = {
    NoEncoderInput, MemoryWithoutReference, MemoryForEver, MemoryNameKept, MemoryOfBefore, EncoderIsFree,
}  # fmt: skip
"""Those that only an encoder-decoder can show."""
