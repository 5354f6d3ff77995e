"""Rows for an encoder-decoder: spans are taken out of each, and the decoder writes them (T5 1910.10683 §3.1.4).

    row       Thank you for inviting me to your party last week
    source    Thank you <0> me to your <1> END
    target    <0> for inviting <1> party last week END

Text and spans take turns, text first. What is taken out of a row is cut into its spans, and its text into as many
pieces, at borders drawn from all that there are, with numbers keyed by (seed, number of the row in the run): T5's mask,
the same at every layout, another one in every epoch. Rows are texts of one length, as in T5: documents meet inside of
them, and the stream's last row, which would be shorter, is left out.

R rows, N tokens of one, S of its source, T of its target, K spans.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ... import DataError
from ...kernels.random import SPANS, uniform
from .config import SpanConfig
from .rows import Batch, Cursor, Rows, Source
from .stream import TokenStream


class SpanRows(Rows):
    """The rows of `stream`, as above; `seq_len` tokens of the stream make one.

    Args:
        spans: how much is taken out.
        start: the id that the decoder begins with.
        sentinels: ids of the spans' marks, in order.

    Raises:
        DataError: the stream does not fill a row. ConfigError: there are more spans than marks.
    """

    def __init__(
        self, stream: TokenStream, seq_len: int, seed: int, spans: SpanConfig, start: int, sentinels: Sequence[int]
    ) -> None:
        super().__init__(stream, seq_len, seed)
        spans.check_row(seq_len)
        if not len(self):
            raise DataError(f"the token stream ({len(stream.ids)} tokens) fills no row of {seq_len}: give more text")
        self.spans, self.start, self.marks_K = spans, start, np.array(sentinels[: spans.count(seq_len)])

    def __len__(self) -> int:
        return len(self.stream.ids) // self.seq_len

    def _batch(self, cursor: Cursor, global_batch: int, first: int, count: int) -> Batch:
        epochs_R, rows_R = (part[first : first + count] for part in self._take(cursor, global_batch))
        return self._lay(rows_R, epochs_R * len(self) + rows_R, global_batch)

    def read(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the stream, as many as there are, as the whole of a global batch."""
        rows_R = np.arange(first, min(first + count, len(self)))
        return self._lay(rows_R, rows_R, len(rows_R))

    def _lay(self, rows_R: np.ndarray, numbers_R: np.ndarray, global_batch: int) -> Batch:
        source_RS, target_RT = self.corrupt(rows_R, numbers_R)
        begun_RT = np.concatenate([np.full((len(rows_R), 1), self.start), target_RT[:, :-1]], axis=1)
        tokens_T, positions_T, borders, index_T = self._flat(begun_RT, numbers_R)
        tokens_S, positions_S, cu_rows, index_S = self._flat(source_RS, numbers_R)
        return Batch(
            tokens_T=tokens_T,
            targets_T=torch.from_numpy(target_RT.reshape(-1)),
            positions_T=positions_T,
            cu_seqlens=borders,
            cu_rows=borders,
            valid_T=torch.ones(tokens_T.shape, dtype=torch.bool),
            index_T=index_T,
            total_tokens=global_batch * target_RT.shape[1],
            source=Source(tokens_S, positions_S, cu_rows, index_S, global_batch * source_RS.shape[1]),
        )

    def corrupt(self, rows_R: np.ndarray, numbers_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [R, S] and target [R, T], int64, of these rows of the stream; `numbers_R` are theirs in the run."""
        length, end = self.seq_len, np.full((len(rows_R), 1), self.stream.eos_id)
        tokens_RN = self.stream.ids[rows_R[:, None] * length + np.arange(length)].astype(np.int64)
        noise_RN = self.mask(numbers_R)
        first_RN = noise_RN & ~np.pad(noise_RN, ((0, 0), (1, 0)))[:, :-1]  # of each span
        marks_RN = self.marks_K[(first_RN.cumsum(1) - 1).clip(0)]
        source_RS = np.where(first_RN, marks_RN, tokens_RN)[~noise_RN | first_RN].reshape(len(rows_R), -1)
        pairs_RN2 = np.stack([marks_RN, tokens_RN], axis=-1)[np.stack([first_RN, noise_RN], axis=-1)]
        return np.concatenate([source_RS, end], 1), np.concatenate([pairs_RN2.reshape(len(rows_R), -1), end], 1)

    def mask(self, numbers_R: np.ndarray) -> np.ndarray:
        """bool [R, N]: what is taken out of the rows with these numbers in the run."""
        length = self.seq_len
        noise, pieces = self.spans.noise(length), self.spans.count(length)
        index_RN = torch.from_numpy(numbers_R)[:, None] * length + torch.arange(length)
        draw_RN = uniform(self.seed, index_RN.flatten(), step=0, layer=0, purpose=SPANS).view(-1, length).numpy()
        lengths_RK2 = np.stack([_cut(draw_RN[:, noise:], pieces), _cut(draw_RN[:, :noise], pieces)], axis=-1)
        ends_RK2 = lengths_RK2.reshape(len(numbers_R), -1).cumsum(1)
        turns_RN = (ends_RK2[:, None, :] <= np.arange(length)[None, :, None]).sum(-1)
        return turns_RN % 2 == 1

    def _flat(self, ids_RS: np.ndarray, numbers_R: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Ids, positions, borders and global indices of rows laid end to end."""
        rows, length = ids_RS.shape
        stride = max(self.spans.source(self.seq_len), self.spans.target(self.seq_len))
        place_RS = np.tile(np.arange(length), (rows, 1))
        index_RS = numbers_R[:, None] * stride + place_RS
        borders = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        ids, places, index = (torch.from_numpy(part.reshape(-1)) for part in (ids_RS, place_RS, index_RS))
        return ids, places, borders, index


def _cut(draw_RM: np.ndarray, pieces: int) -> np.ndarray:
    """int64 [R, pieces], each at least 1: M cut at the `pieces` - 1 of the M - 1 borders with the smallest draws."""
    rows, total = draw_RM.shape
    borders_RK = np.sort(draw_RM[:, 1:].argsort(axis=1, kind="stable")[:, : pieces - 1], axis=1) + 1
    ends = (np.zeros((rows, 1), np.int64), borders_RK, np.full((rows, 1), total))
    return np.diff(np.concatenate(ends, axis=1), axis=1)
