"""The invariants of the scheduling core, checked from outside after every step. Each message names its rule."""

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise

from turnout.inference.core.request import Request
from turnout.inference.core.scheduler import Scheduler
from turnout.inference.core.step import Scheduled, StepPlan

from .doubles import MODEL, CanaryCache


def check_blocks(scheduler: Scheduler, late: Collection[Request], taken: Collection[int]) -> None:
    """Counts, sets and tables; `late` are finished requests whose step is still launched, `taken` blocks are ours."""
    blocks = scheduler.blocks
    free, idle = Counter(blocks.free), Counter(list(blocks.prefix.idle))
    referenced = Counter(block for block, count in enumerate(blocks.counts) if count)
    pool = Counter(range(1, blocks.num_usable + 1))
    assert free + idle + referenced == pool, "I1 every usable block is in exactly one set"
    owners = [*scheduler.running, *late]
    tables = Counter(taken)
    for request in owners:
        tables.update((*kept(request), *request.replaced_blocks, *request.memory_table))
    assert tables == +Counter(dict(enumerate(blocks.counts))), "I1 a count is the number of tables that hold the block"
    for request in (*scheduler.waiting, *scheduler.held.values()):
        assert not request.block_table, "I2 a waiting request holds nothing"
        assert not request.memory_table, "I2 a waiting request has no memory"
    for request in owners:
        table = kept(request)
        assert len(set(table)) == len(table), "I8 no block twice in a table"
        for block in request.block_table[request.num_computed_tokens // blocks.block_size :]:
            assert blocks.counts[block] == 1, "I8 a writable block has one owner"
        assert blocks.shares or table == list(range(table[0], table[0] + len(table))), "contiguous tables are runs"
        memory = request.memory_table
        assert len({*memory, *table}) == len(memory) + len(table), "I8 a memory is no part of a table"
        assert len(memory) == blocks.spanned(len(request.encoder_token_ids or ())), "O12 a memory holds the whole input"
    live = {request.memory_table for request in owners}
    assert live >= set(blocks.memories.values()), "O12 a memory goes with its last request"
    assert scheduler.stats().usage == len(referenced) / blocks.num_usable, "I10 usage = referenced / usable"


def kept(request: Request) -> list[int]:
    """The table without what a window has left."""
    assert not any(request.block_table[: request.num_dropped_blocks]), "the null block stands for what was given back"
    return request.block_table[request.num_dropped_blocks :]


class PrefixWatch:
    """What was ever published: a name stands for one content for ever, and that content stays while it is published."""

    chained = True
    """A published block's parent is published; behind a window it may be evicted first."""

    def __init__(self) -> None:
        self.value_of: dict[bytes, int] = {}
        self.name_of: dict[int, bytes] = {}

    def check(self, scheduler: Scheduler, cache: CanaryCache, roots: Collection[int]) -> None:
        blocks, prefix = scheduler.blocks, scheduler.blocks.prefix
        assert {name: block for block, name in prefix.hash_of.items()} == prefix.block_of, "I4 names and blocks agree"
        assert set(prefix.idle) <= set(prefix.hash_of), "I1 idle blocks are published"
        assert not set(blocks.free) & set(prefix.hash_of), "I1 a free block has no name"
        last, first = {}, {}
        for block, name in prefix.hash_of.items():
            cells = cache.block(block)
            assert all(cells), "I3 published only when computed"
            assert all(a.value == b.previous for a, b in pairwise(cells)), "I3 a published block is one context"
            value = cells[-1].value
            first[block], last[value] = cells[0].previous, block
            assert self.value_of.setdefault(name, value) == value, "I4 one content for one name"
            assert self.name_of.setdefault(value, name) == name, "I4 one name for one content"
        if not self.chained:
            return
        age = {block: i for i, block in enumerate(prefix.idle)}
        for block, previous in first.items():
            assert previous in last or previous in roots, "I6 a published block's parent is published"
            parent = last.get(previous)
            if block in age and parent in age:
                assert age[block] < age[parent], "I6 tails are evicted before heads"

    def longest_hit(self, scheduler: Scheduler, request: Request) -> int:
        """Tokens that the published blocks hold of this request, at least one token left out."""
        size, names = scheduler.blocks.block_size, scheduler.blocks.prefix.block_of
        assert names.keys() <= self.value_of.keys(), "I3 planning publishes nothing"
        published = {self.value_of[name] for name in names}
        values, hit = MODEL.values(request), 0
        while hit + size < request.num_tokens and values[hit + size - 1] in published:
            hit += size
        return hit


def check_plan(
    scheduler: Scheduler,
    plan: StepPlan,
    *,
    going: Sequence[Request] | None,
    short: bool,
    delayed: Collection[Request],
) -> None:
    """Budget, progress, fairness; to be called while the plan is launched.

    Args:
        going: for a plan ahead, the running requests that go on after the launched step; they get their share.
        short: something else holds blocks, so that perhaps nothing can run.
        delayed: requests that were held, so that later ones may have overtaken them.
    """
    config = scheduler.config
    counts = [item.count for item in plan.scheduled]
    assert (
        sum(counts) + sum(item.encoded for item in plan.scheduled) == plan.num_tokens <= config.max_num_batched_tokens
    ), "the budget holds"
    runnable = scheduler.running or (scheduler.waiting and scheduler.patience <= 0 and not short)
    assert plan.num_tokens >= 1 or not runnable, "P1 something runnable, so at least one token"
    assert all(count >= 1 for count in counts), "P1 nobody is scheduled for nothing"
    served = [item.request for item in plan.scheduled]
    if going is None:
        assert served == scheduler.running, "P7 every running request gets its share"
    else:
        assert served[: len(going)] == list(going), "P7 every request that goes on gets its share"
        assert not plan.preempted, "P5 nobody is preempted while a step runs"
    assert len(served) == 1 or not any(request.suspect for request in served), "a suspect runs alone"
    assert len(scheduler.running) <= config.max_num_seqs, "seats hold"
    for item in plan.scheduled:
        request, end, ahead = item.request, item.end, going is not None
        assert item.end == request.num_launched_tokens, "a share starts where the last one ended"
        assert ahead or item.start == request.num_computed_tokens, "nothing is skipped"
        total = request.num_tokens + request.num_pending_tokens - item.samples
        assert end <= total <= request.num_tokens + ahead, "only tokens are computed that there will be"
        assert item.samples == (end == total and request.max_tokens > 0), "P6 only the last chunk samples"
        assert len(item.block_table) * scheduler.blocks.block_size >= end, "every token has a slot"
    whole = [item.samples or item.request.max_tokens == 0 for item in plan.scheduled]
    assert all(whole[:-1]), "P7 no decode waits for a prefill"
    _check_order(scheduler, plan, delayed)


def check_memories(plan: StepPlan, fresh: Collection[Request], made_before: Collection[int] | None) -> None:
    """Live requests of one input have one memory, made when the first of them starts.

    Args:
        fresh: requests that were not running.
        made_before: roots of the inputs whose memory was there; None = nothing is shared.
    """
    shared = made_before is not None
    holders: dict[int, list[Scheduled]] = {}
    for item in plan.scheduled:
        if item.request.encoder_token_ids is not None:
            key = MODEL.root(item.request) if shared else len(holders)
            holders.setdefault(key, []).append(item)
            assert item.encoded in (0, len(item.request.encoder_token_ids)), "O12 an input is encoded whole"
    left = {MODEL.root(victim) for victim in plan.preempted} if shared else set()
    for key, items in holders.items():
        made = sum(item.encoded > 0 for item in items)
        found = key in made_before if shared else not all(item.request in fresh for item in items)
        assert made == (0 if found else 1) or (made <= 1 and key in left), "O12 a memory is made once"
        assert len({item.memory_table for item in items}) == 1, "O12 equal inputs share a memory"


def _check_order(scheduler: Scheduler, plan: StepPlan, delayed: Collection[Request]) -> None:
    running, waiting = scheduler.running, scheduler.waiting
    assert waiting == sorted(waiting, key=lambda r: r.rank), "P10 the queue is in order of rank"
    for victim in plan.preempted:
        assert all(request.rank < victim.rank for request in running), "P4 the victim has the lowest rank"
    if scheduler.config.batching != "continuous":
        return
    for priority in {request.priority for request in waiting}:
        started = [r.order for r in running if r.priority == priority]
        queued = [r.order for r in waiting if r.priority == priority and r not in delayed]
        assert max(started, default=-1) < min(queued, default=sys.maxsize), "P10 first come, first served"
    if any(request.suspect for request in (*waiting, *running)):
        return
    if plan.num_tokens < scheduler.config.max_num_batched_tokens and waiting and running:
        urgent = min(request.priority for request in waiting)
        assert all(request.priority <= urgent for request in running), "P4 no priority inversion"


def check_drained(scheduler: Scheduler) -> None:
    """Nothing is left of any request."""
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.usage) == (0, 0, 0.0), "I2 drained"
    assert not scheduler.requests, "I2 no request is left"
    assert not scheduler.held, "I2 no held request is left"
    assert not scheduler.blocks.memories, "I2 no memory is left"
    assert not any(scheduler.blocks.counts), "I2 no block is left referenced"
