"""Rows of a token stream in a seeded global order that no layout changes, resumable to the row.

The stream is cut into rows of `seq_len` tokens; an epoch is a permutation of the rows keyed by (seed, epoch). A step
takes the next `global_batch` rows of that order (running into the next epoch when one ends), each rank takes its slice
of them, each micro-batch its slice of that. A cursor is therefore two numbers, the same for every layout.

Shapes: T tokens of one micro-batch (rows x seq_len), R rows, S row length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ... import DataError
from ...configs.typed import check
from .stream import TokenStream


@dataclass(frozen=True)
class Cursor:
    """How many rows of which epoch the run has consumed."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class Source:
    """What an encoder reads beside a `Batch`: as many rows of one length, laid end to end, without padding, on the CPU.

    Attributes:
        tokens_S: int64 ids.
        positions_S: int64 position inside the row.
        cu_rows: int32 borders of the rows, from 0 to S.
        index_S: int64 global token index, the same at every layout and different in every epoch.
        total_tokens: tokens of the whole GLOBAL batch.
    """

    tokens_S: Tensor
    positions_S: Tensor
    cu_rows: Tensor
    index_S: Tensor
    total_tokens: int


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: whole rows, laid end to end, on the CPU.

    Attributes:
        tokens_T: int64 ids. Padding (only behind the end of the stream) holds the separator.
        targets_T: int64 id of the following token, -1 for padding.
        positions_T: int64 position inside the document, restarting at 0 where a document or a row begins.
        cu_seqlens: int32 borders of the attention segments (documents cut by rows), from 0 to T.
        cu_rows: int32 borders of the rows, from 0 to T.
        valid_T: bool, False for padding.
        index_T: int64 global token index, the same at every layout and different in every epoch.
        total_tokens: valid targets of the whole GLOBAL batch, the loss's denominator.
        source: what an encoder reads; None without one.
        written_T: bool, the tokens of rows that the student has written; None = the text has all.
        written_tokens: those among `total_tokens` that belong to such rows.
    """

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    cu_rows: Tensor
    valid_T: Tensor
    index_T: Tensor
    total_tokens: int
    source: Source | None = None
    written_T: Tensor | None = None
    written_tokens: int = 0


class Rows:
    """The rows of `stream`; `len(rows)` of them. The last is padded when the stream does not fill it.

    Raises:
        DataError: the stream holds no token to predict.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        check(seq_len >= 1, "train.seq_len", seq_len, "must be at least 1", "use 256")
        check(0 <= seed < 2**64, "seed", seed, "must lie in 0 to 2**64 - 1", "use 0")
        if len(stream) < 1:
            raise DataError("the token stream is empty: give documents with text")
        self.stream, self.seq_len, self.seed = stream, seq_len, seed
        self._orders: dict[int, np.ndarray] = {}  # a cache of the last epochs' permutations; a pure function of seed

    def __len__(self) -> int:
        return -(-len(self.stream) // self.seq_len)

    @property
    def sha256(self) -> str:
        """Of what is read."""
        return self.stream.sha256

    def advance(self, cursor: Cursor, count: int) -> Cursor:
        """The cursor after `count` more rows."""
        epochs, row = divmod(cursor.row + count, len(self))
        return Cursor(cursor.epoch + epochs, row)

    def batch(
        self,
        cursor: Cursor,
        global_batch: int,
        rank: int = 0,
        size: int = 1,
        micro: int = 0,
        micro_batch: int | None = None,
    ) -> Batch:
        """Micro-batch number `micro` of data-parallel `rank` of the step that starts at `cursor`.

        Args:
            global_batch: rows in the step, over all ranks.
            rank: this rank among the `size` data-parallel ones.
            micro: which of the rank's micro-batches.
            micro_batch: rows in each; None takes all of the rank's rows at once.

        Raises:
            ConfigError: the rows do not divide evenly.
            IndexError: there is no such rank or micro-batch.
        """
        check(
            global_batch >= 1 and global_batch % size == 0,
            "train.global_batch",
            global_batch,
            f"must be a multiple of the {size} data-parallel ranks",
            f"use {-(-max(global_batch, 1) // size) * size}",
        )
        share = global_batch // size
        each = share if micro_batch is None else micro_batch
        check(
            each >= 1 and share % each == 0,
            "train.micro_batch",
            each,
            f"must divide the {share} rows of a rank",
            "use 1 or another divisor",
        )
        if not (0 <= rank < size and 0 <= micro < share // each):
            raise IndexError(f"rank {rank} of {size}, micro-batch {micro} of {share // each}")
        return self._batch(cursor, global_batch, rank * share + micro * each, each)

    def _batch(self, cursor: Cursor, global_batch: int, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the step's `global_batch`."""
        epochs_R, rows_R = self._take(cursor, global_batch)
        total = int(np.minimum(self.seq_len, len(self.stream) - rows_R * self.seq_len).sum())
        return self._gather(epochs_R[first : first + count], rows_R[first : first + count], total)

    def _take(self, cursor: Cursor, count: int) -> tuple[np.ndarray, np.ndarray]:
        epochs_R, places_R = np.divmod(cursor.row + np.arange(count), len(self))
        epochs_R += cursor.epoch
        rows_R = np.empty(count, np.int64)
        for epoch in np.unique(epochs_R):
            here = epochs_R == epoch
            rows_R[here] = self._order(int(epoch))[places_R[here]]
        return epochs_R, rows_R

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch. Philox's stream is fixed by its paper; `Generator.permutation` is not."""
        if epoch not in self._orders:
            keys = np.random.Philox(key=self.seed + (epoch << 64)).random_raw(len(self))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.argsort(keys, kind="stable")
        return self._orders[epoch]

    def _gather(self, epochs_R: np.ndarray, rows_R: np.ndarray, total_tokens: int) -> Batch:
        seq_len, end, eos_id = self.seq_len, len(self.stream), self.stream.eos_id
        offsets_RS = rows_R[:, None] * seq_len + np.arange(seq_len)
        valid_RS = offsets_RS < end
        safe_RS = np.minimum(offsets_RS, end - 1)
        tokens_RS = np.where(valid_RS, self.stream.ids[safe_RS], eos_id).astype(np.int64)
        targets_RS = np.where(valid_RS, self.stream.ids[safe_RS + 1].astype(np.int64), -1)
        begins_RS = (tokens_RS == eos_id) & (offsets_RS <= end)  # padding is one segment, begun at `end`
        positions_T, cu_seqlens = segments(begins_RS)
        index_RS = offsets_RS + epochs_R[:, None] * (len(self) * seq_len)
        return Batch(
            tokens_T=torch.from_numpy(tokens_RS.reshape(-1)),
            targets_T=torch.from_numpy(targets_RS.reshape(-1)),
            positions_T=positions_T,
            cu_seqlens=cu_seqlens,
            cu_rows=torch.arange(0, begins_RS.size + 1, seq_len, dtype=torch.int32),
            valid_T=torch.from_numpy(valid_RS.reshape(-1)),
            index_T=torch.from_numpy(index_RS.reshape(-1)),
            total_tokens=total_tokens,
        )


def segments(begins_RS: np.ndarray) -> tuple[Tensor, Tensor]:
    """`positions_T` and `cu_seqlens` of rows in which documents begin at these places, and one with every row."""
    begin_T = begins_RS.reshape(-1).copy()
    begin_T[:: begins_RS.shape[1]] = True
    place_T = np.arange(begin_T.size)
    started_T = np.maximum.accumulate(np.where(begin_T, place_T, 0))
    borders = np.append(np.flatnonzero(begin_T), begin_T.size).astype(np.int32)
    return torch.from_numpy(place_T - started_T), torch.from_numpy(borders)
