"""Rows: every token once an epoch, in one global order that no layout changes."""

import numpy as np
import pytest
import torch

from turnout import ConfigError, DataError
from turnout.moe.data.rows import Cursor, Rows
from turnout.moe.data.stream import TokenStream


def stream(length=103, seed=0):
    ids = np.random.default_rng(seed).integers(1, 50, length).astype(np.uint16)
    ids[np.random.default_rng(seed + 1).random(length) < 0.1] = 0
    ids[0] = ids[-1] = 0
    return TokenStream(ids, 0)


def reference(source, seq_len, row):
    """One row by the definition, token by token: (token, target, position, valid) and the segments' begins."""
    out, begins, position = [], [], 0
    for i in range(seq_len):
        place = row * seq_len + i
        valid = place < len(source)
        token = int(source.ids[place]) if valid else 0
        if i == 0 or (valid and token == 0) or place == len(source):
            position = 0
            begins.append(i)
        out.append((token, int(source.ids[place + 1]) if valid else -1, position, valid))
        position += 1
    return out, begins


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 102, 200])
def test_rows_match_the_definition_token_by_token(seq_len):
    source = stream()
    rows = Rows(source, seq_len, seed=3)
    batch = rows.batch(Cursor(), len(rows))
    order = batch.index_T.view(-1, seq_len)[:, 0] // seq_len
    assert sorted(order.tolist()) == list(range(len(rows)))
    expected, borders = [], []
    for place, row in enumerate(order.tolist()):
        tokens, begins = reference(source, seq_len, row)
        expected += tokens
        borders += [place * seq_len + b for b in begins]
    columns = (batch.tokens_T, batch.targets_T, batch.positions_T, batch.valid_T)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected
    assert batch.cu_seqlens.tolist() == [*borders, len(expected)]
    assert batch.cu_rows.tolist() == list(range(0, len(expected) + 1, seq_len))
    assert batch.total_tokens == int(batch.valid_T.sum()) == len(source)
    assert batch.cu_seqlens.dtype == batch.cu_rows.dtype == torch.int32
    assert batch.tokens_T.dtype == batch.targets_T.dtype == batch.index_T.dtype == torch.int64


def test_the_target_of_a_last_token_is_the_separator():
    batch = Rows(TokenStream(np.array([0, 5, 6, 0, 7, 0], np.uint16), 0), 5, seed=0).batch(Cursor(), 1)
    assert batch.tokens_T.tolist() == [0, 5, 6, 0, 7]
    assert batch.targets_T.tolist() == [5, 6, 0, 7, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]


def collect(rows, cursor, steps, global_batch, size, micro_batch):
    """The concatenated global batches, as any layout sees them."""
    parts = []
    for _ in range(steps):
        for rank in range(size):
            for micro in range(global_batch // size // micro_batch):
                parts.append(rows.batch(cursor, global_batch, rank, size, micro, micro_batch))
        cursor = rows.advance(cursor, global_batch)
    return parts, cursor


def test_no_layout_changes_order_tokens_or_denominator():
    rows = Rows(stream(), 7, seed=1)
    whole, end = collect(rows, Cursor(), 9, 8, 1, 8)
    for size, micro_batch in [(1, 1), (2, 4), (2, 1), (4, 2), (8, 1)]:
        parts, cursor = collect(rows, Cursor(), 9, 8, size, micro_batch)
        assert cursor == end
        for name in ("tokens_T", "targets_T", "positions_T", "valid_T", "index_T"):
            assert torch.equal(*(torch.cat([getattr(b, name) for b in bs]) for bs in (parts, whole))), name
        each = len(parts) // len(whole)
        assert [b.total_tokens for b in parts] == [b.total_tokens for b in whole for _ in range(each)]


def test_resuming_at_a_cursor_continues_exactly_even_at_another_size():
    rows = Rows(stream(), 7, seed=1)
    undisturbed, _ = collect(rows, Cursor(), 10, 4, 1, 4)
    _, cursor = collect(rows, Cursor(), 4, 4, 2, 1)
    resumed, _ = collect(Rows(stream(), 7, seed=1), cursor, 6, 4, 4, 1)
    expected = torch.cat([b.index_T for b in undisturbed[4:]])
    assert torch.equal(torch.cat([b.index_T for b in resumed]), expected)


def test_each_epoch_takes_every_row_once_in_a_new_order_and_with_new_indices():
    rows = Rows(stream(), 7, seed=5)
    parts, cursor = collect(rows, Cursor(), 6 * len(rows) // 2, 2, 1, 2)
    assert cursor == Cursor(6, 0)
    index = torch.cat([b.index_T for b in parts])
    assert len(index.unique()) == len(index)
    epochs = (index[::7] // 7).view(6, -1)
    orders = [tuple((e % len(rows)).tolist()) for e in epochs]
    assert len(set(orders)) == 6
    assert all(sorted(o) == list(range(len(rows))) for o in orders)
    assert [e.tolist() for e in epochs // len(rows)] == [[n] * len(rows) for n in range(6)]


def test_a_batch_may_span_epochs():
    rows = Rows(stream(), 30, seed=5)
    batch = rows.batch(Cursor(0, 1), 3 * len(rows))
    assert rows.advance(Cursor(0, 1), 3 * len(rows)) == Cursor(3, 1)
    taken = batch.index_T.view(-1, 30)[:, 0] // 30
    assert (taken // len(rows)).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert batch.total_tokens == int(batch.valid_T.sum())


def test_the_order_is_frozen_and_depends_on_the_seed():
    rows = Rows(stream(), 10, seed=0)
    first = (rows.batch(Cursor(), len(rows)).index_T[::10] // 10).tolist()
    assert first == [0, 2, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    assert first != (Rows(stream(), 10, seed=1).batch(Cursor(), len(rows)).index_T[::10] // 10).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 6, "size": 4}, r"train\.global_batch \(6\) must be a multiple of the 4 .*: use 8"),
        ({"global_batch": 0}, r"train\.global_batch \(0\)"),
        ({"global_batch": 8, "size": 2, "micro_batch": 3}, r"train\.micro_batch \(3\) must divide the 4 rows"),
        ({"global_batch": 8, "micro_batch": 0}, r"train\.micro_batch \(0\)"),
    ],
)
def test_uneven_batches_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Rows(stream(), 7, seed=0).batch(Cursor(), **arguments)


def test_a_rank_or_micro_batch_that_does_not_exist_is_refused():
    rows = Rows(stream(), 7, seed=0)
    for wrong in ({"rank": 2, "size": 2}, {"micro": 1}, {"micro": 2, "micro_batch": 2}, {"rank": -1}):
        with pytest.raises(IndexError):
            rows.batch(Cursor(), 4, **wrong)


def test_an_empty_stream_is_refused():
    with pytest.raises(DataError, match="empty"):
        Rows(TokenStream(np.array([0], np.uint16), 0), 7, seed=0)
