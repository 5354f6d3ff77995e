"""The simulator with a window: blocks that were given back are reused at once, and nobody reads them."""

from collections import Counter
from functools import partial

import pytest

from turnout.inference.core.blocks import BlockManager
from turnout.inference.core.request import Request
from turnout.inference.core.step import Scheduled

from .doubles import MODEL
from .invariants import PrefixWatch, check_blocks
from .simulator import Simulation

QUICK, CHUNK, ALL = 100, 100, 1000


class WindowWatch(PrefixWatch):
    chained = False


class WindowSimulation(Simulation):
    """Every layer sees `window` tokens, at least two: the canary chains each value from the one before it."""

    def __init__(self, seed: int, blocks: type[BlockManager] = BlockManager) -> None:
        self.window = 2 + seed % 11
        super().__init__(seed, blocks=partial(blocks, window=self.window))
        self.watch = WindowWatch()

    def _first(self, item: Scheduled) -> int:
        """The oldest position that the item's tokens see."""
        return max(item.start - self.window + 1, 0)

    def _read(self, item: Scheduled, end: int) -> list[int]:
        values = MODEL.values(item.request, self._tokens(item))[:end]
        first = self._first(item)
        assert self.cache.read(item, end)[first:] == values[first:], "canary: a slot that is seen holds something else"
        return values

    def _check_blocks(self) -> None:
        check_blocks(self.scheduler, self._late(), self.taken)
        for request in self.scheduler.running:
            self.seen["dropped"] += request.num_dropped_blocks > 0
            self._check_passed(request)
        for plan in self.launched:
            for item in plan.scheduled:
                seen = item.block_table[self._first(item) // self.config.block_size :]
                assert all(self.scheduler.blocks.counts[block] for block in seen), "I7 what is seen is kept"

    def _check_passed(self, request: Request) -> None:
        """What is behind the window was given back, but for the last full block."""
        size, computed = self.config.block_size, request.num_computed_tokens
        passed = min((computed - self.window + 1) // size, computed // size - 1)
        if self.config.kv_layout == "paged" and request.num_preemptions == 0 and computed > request.num_cached_tokens:
            assert request.num_dropped_blocks == max(passed, 0), "as many as can be"


@pytest.mark.parametrize("seed", range(QUICK))
def test_every_invariant_holds_with_a_window(seed):
    WindowSimulation(seed).run()


@pytest.mark.full
@pytest.mark.parametrize("first", range(QUICK, ALL, CHUNK))
def test_every_invariant_holds_with_windows_for_many_seeds(first):
    for seed in range(first, first + CHUNK):
        WindowSimulation(seed).run()


def test_the_seeds_drop_hit_fork_and_preempt():
    seen: Counter[str] = Counter()
    for seed in range(QUICK):
        simulation = WindowSimulation(seed)
        simulation.run()
        seen.update(simulation.seen)
    assert all(seen[name] >= 5 for name in ("dropped", "hit", "forked", "copied", "preempted", "ahead", "failed")), seen


class EarlyBlocks(BlockManager):
    """Gives back one token's block too early."""

    def drop_passed(self, request: Request) -> None:
        if self._window is not None:
            self._window -= 1
            super().drop_passed(request)
            self._window += 1


class ForkingBlocks(BlockManager):
    """A choice takes over a table with gaps."""

    def _parent(self, request: Request) -> Request | None:
        parent = request.parent
        if parent is None:
            return None
        dropped, parent.num_dropped_blocks = parent.num_dropped_blocks, 0
        found = super()._parent(request)
        parent.num_dropped_blocks = dropped
        return found


@pytest.mark.parametrize("mutant", [EarlyBlocks, ForkingBlocks])
def test_mutants_are_killed(mutant):
    def dies(seed: int) -> bool:
        try:
            WindowSimulation(seed, mutant).run()
        except Exception:  # noqa: BLE001  (a mutant may break anything)
            return True
        return False

    assert any(dies(seed) for seed in range(QUICK))
