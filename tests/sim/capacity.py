"""Capacity counters in the simulation: pages of routing beside the canary cache, chained through blocks.

Where a token goes is a hash of its context, and whether it finds a slot depends on all tokens of its request before it.
A counter that is stale, shared by mistake, not copied or not restored sends some token where it would not go alone.
"""

from collections.abc import Sequence

from turnout.inference.core.step import Scheduled

EXPERTS, CHOICES, CAPACITY = 3, 2, 4


def asked(value: int) -> list[int]:
    """The two experts that a token of this context asks for, best first."""
    first = value % EXPERTS
    return [first, (first + 1 + value // EXPERTS % (EXPERTS - 1)) % EXPERTS]


def place(value: int, taken: list[int]) -> list[int]:
    """Where its choices go, −1 − expert if that is full; counts what they take."""
    went = []
    for expert in asked(value):
        kept = taken[expert] < CAPACITY
        taken[expert] += kept
        went.append(expert if kept else -1 - expert)
    return went


def went_alone(values: Sequence[int]) -> list[list[int]]:
    """Where tokens of these values go when their request is served by itself and all at once."""
    taken = [0] * EXPERTS
    return [place(value, taken) for value in values]


class CapacityPages:
    """What `ExpertPages` does, in plain Python: ids by slot, counters by full block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.ids: list[list[int] | None] = [None] * (num_blocks * block_size)
        self.taken: list[list[int] | None] = [None] * num_blocks

    def step(self, items: Sequence[Scheduled], values: Sequence[Sequence[int]]) -> None:
        """Compute the items' tokens from what the pages say about the ones before, and compare.

        Args:
            values: of each item, those of its request's tokens up to its end.
        """
        for source, target in (item.copied for item in items if item.copied is not None):
            size = self.block_size
            self.ids[target * size : (target + 1) * size] = self.ids[source * size : (source + 1) * size]
            self.taken[target] = self.taken[source]
        for item, own in zip(items, values, strict=True):
            self._compute(item, own)

    def _compute(self, item: Scheduled, values: Sequence[int]) -> None:
        alone = went_alone(values)
        taken = self.before(item)
        for position in range(item.start, item.end):
            went = place(values[position], taken)
            assert went == alone[position], "capacity: a token went where it would not go alone"
            self.ids[self.slot(item, position)] = went
            if (position + 1) % self.block_size == 0:
                self.taken[item.block_table[position // self.block_size]] = list(taken)
        for position, expected in enumerate(alone):
            assert self.ids[self.slot(item, position)] == expected, "capacity: a slot names experts of another token"

    def before(self, item: Scheduled) -> list[int]:
        """The counters of the tokens before the item's: the last full block's, and its successor's slots counted."""
        full = item.start // self.block_size
        taken = list(self.taken[item.block_table[full - 1]] or ()) if full else [0] * EXPERTS
        for position in range(full * self.block_size, item.start):
            for expert in self.ids[self.slot(item, position)] or ():
                taken[expert] += expert >= 0
        return taken

    def slot(self, item: Scheduled, position: int) -> int:
        return item.block_table[position // self.block_size] * self.block_size + position % self.block_size
