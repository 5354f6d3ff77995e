"""Stand-ins for what the scheduler serves: a model whose tokens are hashes of their context, a cache that remembers
which context each slot was computed from, and a clock that only moves when told."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from turnout.inference.core.request import FinishReason, Request
from turnout.inference.core.step import Scheduled

PRIME = 2**61 - 1
VOCABULARY = 6  # prompts use 0, 1 and 2; 4 and 5 end a sequence
EOS = frozenset({4, 5})
END = VOCABULARY  # of an encoder's input


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class HashModel:
    """The value at a position is a hash of all tokens up to it, an encoder's input included; the next token is a hash
    of the last value."""

    def root(self, request: Request) -> int:
        """The value before the first token."""
        value = zlib.crc32(request.cache_salt.encode())
        if request.encoder_token_ids is None:
            return value
        for token in (*request.encoder_token_ids, END):
            value = self.value(value, token)
        return value

    def memory(self, request: Request) -> list[int]:
        """What cross-attention reads: at every position a hash of the whole input."""
        root = self.root(request)
        return [self.value(root, position) for position in range(len(request.encoder_token_ids or ()))]

    @staticmethod
    def value(previous: int, token: int) -> int:
        return (previous * 6364136223846793005 + token + 1) % PRIME

    @staticmethod
    def next_token(value: int, choice: int) -> int:
        return ((value + choice) * 1442695040888963407 % PRIME >> 17) % VOCABULARY

    def values(self, request: Request, tokens: Sequence[int] | None = None) -> list[int]:
        """The right value of every token of the request, or of these."""
        values, value = [], self.root(request)
        for token in request.token_ids if tokens is None else tokens:
            value = self.value(value, token)
            values.append(value)
        return values

    def complete(self, request: Request) -> tuple[list[int], FinishReason]:
        """What the request must generate, by itself and all at once."""
        value = self.root(request)
        for token in request.prompt_token_ids:
            value = self.value(value, token)
        output: list[int] = []
        params = request.params
        if params.max_tokens == 0:
            return output, "length"
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else EOS)
        while True:
            output.append(self.next_token(value, request.choice))
            if output[-1] in stops and len(output) > params.min_tokens:
                return output, "stop"
            if len(output) == params.max_tokens:
                return output, "length"
            value = self.value(value, output[-1])


MODEL = HashModel()


@dataclass(frozen=True, slots=True)
class Cell:
    """What a slot holds: the value, and the value before it that it was computed from."""

    value: int
    previous: int


class CanaryCache:
    """KV slots that give away any alias, stale or missing block: each value is chained from the PREVIOUS slot's stored
    one, read through the block table, and every read is compared with the model's own values."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cells: list[Cell | None] = [None] * (num_blocks * block_size)

    def slot(self, item: Scheduled, position: int) -> int:
        return item.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def read(self, item: Scheduled, end: int) -> list[int | None]:
        """The stored values of positions 0 to `end` - 1, through the table."""
        cells = (self.cells[self.slot(item, position)] for position in range(end))
        return [cell.value if cell else None for cell in cells]

    def copy(self, source: int, target: int) -> None:
        size = self.block_size
        self.cells[target * size : (target + 1) * size] = self.block(source)

    def spoil(self, item: Scheduled) -> None:
        """What a step may leave behind that fails half-way."""
        for position in range(item.start, item.end):
            self.cells[self.slot(item, position)] = Cell(-7, -7)

    def write(self, model: HashModel, item: Scheduled, tokens: Sequence[int]) -> list[int]:
        """Compute the item's tokens; returns the slots written."""
        slots = []
        for position, token in enumerate(tokens[item.start :], item.start):
            if position == 0:
                previous = model.root(item.request)
            else:
                cell = self.cells[self.slot(item, position - 1)]
                previous = cell.value if cell else -1
            slots.append(self.slot(item, position))
            self.cells[slots[-1]] = Cell(model.value(previous, token), previous)
        return slots

    def read_memory(self, item: Scheduled) -> list[int | None]:
        """What cross-attention finds, through the table."""
        cells = (self.cells[slot] for slot in self._memory_slots(item))
        return [cell.value if cell else None for cell in cells]

    def write_memory(self, model: HashModel, item: Scheduled) -> list[int]:
        """Run the encoder if the item wants it; returns the slots written."""
        slots = self._memory_slots(item) if item.encoded else []
        for slot, value in zip(slots, model.memory(item.request), strict=False):
            self.cells[slot] = Cell(value, -1)
        return slots

    def _memory_slots(self, item: Scheduled) -> list[int]:
        size, table = self.block_size, item.memory_table
        count = len(item.request.encoder_token_ids or ())
        return [table[at // size] * size + at % size for at in range(count)]

    def block(self, block: int) -> list[Cell | None]:
        return self.cells[block * self.block_size : (block + 1) * self.block_size]
