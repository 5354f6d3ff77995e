"""A mixture: shares to the row, phases, one order at every layout, resumed anywhere; no row twice an epoch."""

from collections import Counter

import numpy as np
import pytest
import torch

from turnout import ConfigError
from turnout.launch.compose import compose
from turnout.moe.data.config import DataConfig, Source
from turnout.moe.data.mixture import BLOCK, Mixture
from turnout.moe.data.rows import Cursor, Rows
from turnout.moe.data.stream import TokenStream
from turnout.moe.train.loop import train
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.runs import corpus, fingerprint, tiny

S = 5
SOURCES = (Source(path="a", weight=3, until=0.5), Source(path="b", weight=1), Source(path="c", weight=1, since=0.25))


def streams():
    """Source s holds the ids 100 s + 1 ... only, so that a token says where it is from."""
    return [
        TokenStream(np.append(0, np.arange(n) % 90 + 100 * s + 1).astype(np.uint16), 0)
        for s, n in enumerate((80, 33, 57))
    ]


def mixture(total=8 * BLOCK, step=4, seed=1, sources=SOURCES):
    return Mixture(streams(), sources, S, seed, total, step)


def test_shares_are_exact_in_every_block_and_change_with_the_phases():
    mix = mixture()
    drawn = [mix.place(row)[0] for row in range(8 * BLOCK)]
    shares = [Counter(drawn[i : i + BLOCK]) for i in range(0, 8 * BLOCK, BLOCK)]
    assert [dict(share) for share in shares[:2]] == [{0: 768, 1: 256}] * 2
    assert [sorted(share.values()) for share in shares[2:4]] == [[205, 205, 614]] * 2
    assert [dict(share) for share in shares[4:]] == [{1: 512, 2: 512}] * 4
    assert drawn[:BLOCK] != drawn[BLOCK : 2 * BLOCK]
    counted = Counter()
    for row, source in enumerate(drawn):
        assert mix.place(row) == (source, counted[source])
        counted[source] += 1


def test_a_row_holds_its_source_s_tokens_and_each_is_read_once_an_epoch():
    mix = mixture()
    batch = mix.batch(Cursor(row=40), 64)
    seen = {source: [] for source in range(3)}
    for row in range(64):
        source, number = mix.place(40 + row)
        own = slice(row * S, (row + 1) * S)
        alone = Rows(streams()[source], S, 1)
        wanted = alone.batch(alone.advance(Cursor(), number), 1)
        for name in ("tokens_T", "targets_T", "positions_T", "valid_T"):
            assert torch.equal(getattr(batch, name)[own], getattr(wanted, name)), name
        seen[source].append(number)
    assert batch.total_tokens == int(batch.valid_T.sum())
    assert batch.index_T.tolist() == list(range(40 * S, 104 * S))
    assert batch.cu_rows.tolist() == list(range(0, 64 * S + 1, S))
    assert set(batch.cu_rows.tolist()) <= set(batch.cu_seqlens.tolist())
    assert batch.cu_rows.dtype == batch.cu_seqlens.dtype == torch.int32


def test_no_layout_and_no_resumption_changes_the_order():
    whole = mixture().batch(Cursor(row=BLOCK - 4), 8)
    for size, micro in ((2, 2), (4, 1), (8, 1)):
        parts = [
            mixture().batch(Cursor(row=BLOCK - 4), 8, r, size, m, micro)
            for r in range(size)
            for m in range(8 // size // micro)
        ]
        for name in ("tokens_T", "targets_T", "positions_T", "valid_T", "index_T"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert {part.total_tokens for part in parts} == {whole.total_tokens}
    mix = mixture()
    assert mix.advance(mix.advance(Cursor(), 1000), 24) == Cursor(0, 1024)
    assert not torch.equal(mixture(seed=2).batch(Cursor(), 8).tokens_T, mixture().batch(Cursor(), 8).tokens_T)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Source(path="a", weight=0), r"data\.mix\.weight \(0\) must be positive"),
        (lambda: Source(path="a", since=0.5, until=0.5), r"data\.mix\.since \(0\.5\) must lie in"),
        (lambda: DataConfig(mix=()), r"data\.mix \(\[\]\) must name a source"),
        (lambda: DataConfig(mix=(Source(path="a", until=0.5),)), "leaves no source after 0.5 of the run"),
        (lambda: DataConfig(mix=(Source(path="a", since=0.5),)), "leaves no source after 0 of the run"),
        (lambda: mixture(sources=(*SOURCES[:2], Source(path="c", weight=1e-4))), "less than one row in 1024"),
        (
            lambda: compose(
                [
                    "data.mix=[{path: a.txt}, {path: b.txt, since: 0.5}]",
                    "train.steps=null",
                    "train.seconds=9",
                    "nproc=1",
                ]
            ),
            r"data\.mix .* measured in steps",
        ),
    ],
)
def test_what_can_not_work_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_run_on_a_mixture_resumes_to_the_same_bits(tmp_path):
    data = corpus(tmp_path)
    (tmp_path / "other.txt").write_text("All work and no play makes a dull text. " * 400)
    mix = f"data.mix=[{{path: {data}, weight: 3}}, {{path: {tmp_path / 'other.txt'}, since: 0.5}}]"
    words = tiny(data, mix, "train.save_every=2", "train.dtype=float32")
    mesh = build_mesh(ParallelConfig(), "cpu")
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    train(compose(words).config, tmp_path / "whole", mesh, lambda: False)
    asked = iter([False] * 3 + [True] * 9)
    train(compose(words).config, tmp_path / "cut", mesh, lambda: next(asked))
    train(
        compose([*words, f"run={tmp_path / 'cut'}", "train.resume=true"]).config, tmp_path / "cut", mesh, lambda: False
    )
    assert fingerprint(tmp_path / "cut", 6) == fingerprint(tmp_path / "whole", 6)
