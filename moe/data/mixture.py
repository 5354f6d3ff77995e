"""Rows of several streams in fixed proportions that may change over the run, resumable to the row.

The run is cut into phases, in which the same sources take part. A phase is cut into blocks of 1024 rows, in each of
which every source has its share, to the row, in an order keyed by (seed, phase, block). So what a row of the run is,
and how many rows of each source came before it, follows from its number alone: the cursor is that number, the same for
every layout. A source hands out its rows as `Rows` does, in permutations of its own.

S row length.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ...configs.typed import check, digest
from .config import Source
from .rows import Batch, Cursor, Rows
from .stream import TokenStream

BLOCK = 1024


class Mixture(Rows):
    """The rows of `streams`, one a source.

    Args:
        total: rows that the run reads, of which `since` and `until` are shares.
        step: rows of one optimizer step; phases begin with one.

    Raises:
        ConfigError: a source's share is less than one row in a block.
    """

    def __init__(
        self, streams: Sequence[TokenStream], sources: Sequence[Source], seq_len: int, seed: int, total: int, step: int
    ) -> None:
        super().__init__(streams[0], seq_len, seed)
        self.parts = [Rows(stream, seq_len, seed) for stream in streams]
        shares = {0.0, *(source.since for source in sources), *(source.until for source in sources)} - {1.0}
        phases = {round(share * total / step) * step: share for share in sorted(shares)}
        self.begins = list(phases)
        self.counts = [_counts(sources, share) for share in phases.values()]
        self._blocks: dict[tuple[int, int], np.ndarray] = {}  # a cache of the last orders; a pure function of seed

    @property
    def sha256(self) -> str:
        """Of what is read, all streams together."""
        return digest([part.sha256 for part in self.parts])

    def advance(self, cursor: Cursor, count: int) -> Cursor:
        """The cursor after `count` more rows."""
        return Cursor(cursor.epoch, cursor.row + count)

    def place(self, row: int) -> tuple[int, int]:
        """Which source row `row` of the run comes from, and how many of its rows came before."""
        phase = bisect_right(self.begins, row) - 1
        before = sum(self._taken(i, self.begins[i + 1] - self.begins[i]) for i in range(phase))
        own = row - self.begins[phase]
        source = int(self._order_of(phase, own // BLOCK)[own % BLOCK])
        return source, int((before + self._taken(phase, own))[source])

    def _batch(self, cursor: Cursor, global_batch: int, first: int, count: int) -> Batch:
        places = [self.place(cursor.row + i) for i in range(global_batch)]
        rows = [self.parts[source]._take(Cursor(*divmod(at, len(self.parts[source]))), 1) for source, at in places]
        left = [
            len(self.parts[source].stream) - int(rows_R[0]) * self.seq_len
            for (source, _), (_, rows_R) in zip(places, rows, strict=True)
        ]
        total = sum(min(self.seq_len, tokens) for tokens in left)
        batches = []
        for i in range(first, first + count):
            one = self.parts[places[i][0]]._gather(*rows[i], total)
            begin = (cursor.row + i) * self.seq_len
            batches.append(replace(one, index_T=torch.arange(begin, begin + self.seq_len)))
        return _joined(batches)

    def _taken(self, phase: int, rows: int) -> np.ndarray:
        """Rows of each source among the first `rows` of a phase."""
        blocks, rest = divmod(rows, BLOCK)
        partial = np.bincount(self._order_of(phase, blocks)[:rest], minlength=len(self.parts))
        return blocks * self.counts[phase] + partial

    def _order_of(self, phase: int, block: int) -> np.ndarray:
        """The source of each row of a block."""
        if (phase, block) not in self._blocks:
            keys = np.random.Philox(key=self.seed + ((phase << 40 | block) << 64)).random_raw(BLOCK)
            order = np.repeat(np.arange(len(self.parts)), self.counts[phase])[np.argsort(keys, kind="stable")]
            self._blocks = {**dict(list(self._blocks.items())[-8:]), (phase, block): order}
        return self._blocks[phase, block]


def _counts(sources: Sequence[Source], share: float) -> np.ndarray:
    """Rows of each source in a block of the phase that begins at `share` of the run; largest remainders."""
    here = np.array([source.weight * (source.since <= share < source.until) for source in sources])
    exact = here / here.sum() * BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - int(counts.sum())]] += 1
    for source, wanted, found in zip(sources, here, counts, strict=True):
        rule = f"is less than one row in {BLOCK} beside the others' weights"
        check(found > 0 or wanted == 0, "data.mix.weight", source.weight, rule, "raise it or leave the source out")
    return counts


def _joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one row as one."""
    names = ("tokens_T", "targets_T", "positions_T", "valid_T", "index_T")
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    length, zero = len(batches[0].tokens_T), torch.zeros(1, dtype=torch.int32)
    borders = {
        name: torch.cat([zero, *(getattr(b, name)[1:] + i * length for i, b in enumerate(batches))]).int()
        for name in ("cu_seqlens", "cu_rows")
    }
    total = batches[0].total_tokens
    return Batch(**tensors, **borders, total_tokens=total, source=None, written_tokens=0)
