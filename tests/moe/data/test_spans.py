"""Span corruption: nothing is lost, every row has one shape, masks are those of the row at every layout and epoch."""

import numpy as np
import pytest
import torch

from turnout import ConfigError, DataError
from turnout.moe.data.config import DataConfig, SpanConfig
from turnout.moe.data.rows import Cursor
from turnout.moe.data.spans import SpanRows
from turnout.moe.data.stream import TokenStream
from turnout.moe.data.tokenizer import Tokenizer, train_tokenizer

N, START, EOS = 40, 3, 0
MARKS = [199, 198, 197, 196]


def rows(tokens=7 * N + 11, seq_len=N, seed=1, **spans):
    stream = TokenStream((np.arange(tokens) % 150 + 10).astype(np.uint16), EOS)
    return SpanRows(stream, seq_len, seed, SpanConfig(sentinels=4, **spans), START, MARKS)


def restored(source, target):
    """The row: each mark of the source replaced by what follows it in the target."""
    spans, current = {}, None
    for token in target[:-1]:
        if token in MARKS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in source[:-1] for t in spans.get(token, [token])]


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 5.0), (0.02, 3.0)])
def test_source_and_target_hold_the_row_and_the_shapes_are_promised(density, mean):
    some = rows(density=density, mean=mean)
    numbers = np.arange(7)
    source, target = some.corrupt(numbers, numbers)
    assert source.shape == (7, some.spans.source(N))
    assert target.shape == (7, some.spans.target(N))
    assert (source[:, -1] == EOS).all()
    assert (target[:, -1] == EOS).all()
    for row in range(7):
        assert restored(source[row].tolist(), target[row].tolist()) == some.stream.ids[row * N : (row + 1) * N].tolist()
        marks = [token for token in source[row] if token in MARKS]
        assert marks == MARKS[: some.spans.count(N)]
        assert target[row, 0] == MARKS[0]
        assert source[row, 0] not in MARKS, "text comes first"


def test_t5_s_numbers():
    spans = SpanConfig()
    assert (spans.noise(512), spans.count(512)) == (77, 26)
    assert (spans.source(512), spans.target(512)) == (462, 104)


def test_a_span_may_lie_anywhere_and_is_as_long_as_asked():
    some = rows()
    masks = some.mask(np.arange(4000))
    assert (masks.sum(1) == 6).all()
    share = masks.mean(0)
    assert share[0] == 0
    assert share[-1] == 1, "T5's mask ends with a span"
    assert share[5:-8].min() > 0.05
    assert share[5:-8].max() < 0.25
    lengths = np.diff(np.flatnonzero(np.diff(np.pad(masks, ((0, 0), (1, 1))).reshape(-1).astype(int))))[::2]
    counts = np.bincount(lengths)[1:6] / len(lengths)
    np.testing.assert_allclose(counts, 0.2, atol=0.02)  # 6 tokens in 2 spans: every first length from 1 to 5 alike


def test_every_layout_reads_the_same_rows_and_an_epoch_later_others():
    some = rows()
    cursor = Cursor(row=5)
    whole = some.batch(cursor, 4)
    parts = [some.batch(cursor, 4, rank, 2, micro, 1) for rank in range(2) for micro in range(2)]
    for name in ("tokens_T", "targets_T", "positions_T", "index_T", "valid_T"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    for name in ("tokens_S", "positions_S", "index_S"):
        together = torch.cat([getattr(part.source, name) for part in parts])
        assert torch.equal(getattr(whole.source, name), together), name
    assert {part.total_tokens for part in parts} == {whole.total_tokens} == {4 * some.spans.target(N)}
    assert {part.source.total_tokens for part in parts} == {4 * some.spans.source(N)}
    assert len(set(whole.index_T.tolist())) == len(whole.index_T)
    assert torch.equal(whole.tokens_T.view(4, -1)[:, 1:], whole.targets_T.view(4, -1)[:, :-1])
    assert whole.tokens_T.view(4, -1)[:, 0].tolist() == [START] * 4
    first, later = some.mask(np.arange(7)), some.mask(np.arange(7) + len(some))
    assert not (first == later).all(1).any()
    assert (rows(seed=2).mask(np.arange(7)) != first).any()
    assert (rows().mask(np.arange(7)) == first).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="fills no row"):
        rows(tokens=N - 1)
    with pytest.raises(ConfigError, match=r"data\.spans\.sentinels \(4\)"):
        rows(density=0.5, mean=2.0)
    for wrong in ({"density": 1.0}, {"mean": 0.5}, {"sentinels": 0}):
        with pytest.raises(ConfigError, match=rf"data\.spans\.{next(iter(wrong))}"):
            SpanConfig(**wrong)
    with pytest.raises(ConfigError, match=r"data\.vocab_size"):
        DataConfig(vocab_size=300, spans=SpanConfig())


def test_the_tokenizer_keeps_the_last_ids_free_for_marks(tmp_path):
    trained = train_tokenizer(["some text, some more text"] * 3, 270, 5)
    trained.save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    last = tokenizer.vocab_size - 1
    assert [tokenizer.sentinel_id(i) for i in range(5)] == [last - i for i in range(5)]
    assert max(tokenizer.encode("<extra_id_0> is only text <extra_id_4>")) <= last - 5
    with pytest.raises(DataError, match="extra_id_5"):
        tokenizer.sentinel_id(5)
