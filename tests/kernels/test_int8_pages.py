"""Pages of int8: how far a number may be off, what attention makes of it, and that chunks change nothing.

G key/value heads, d head size.
"""

import pytest
import torch

from turnout.kernels import copy_blocks, paged_attention, store_kv
from turnout.kernels.reference.attention import quantise

from .test_paged_attention import BLOCK, Pages


class Quantised(Pages):
    """Pages whose unwritten slots have NaN scales."""

    def __init__(self, lengths, heads, dtype=torch.float32, d=8):
        super().__init__(lengths, heads, dtype, d)
        self.cache_k, self.cache_v = (torch.full(self.cache_k.shape, 77, dtype=torch.int8) for _ in range(2))
        self.scales_k, self.scales_v = (torch.full(self.cache_k.shape[:3], torch.nan) for _ in range(2))

    def step(self, chunks, **options):
        parts = {b: slice(self.done[b], self.done[b] + count) for b, count in chunks.items()}
        slots = [self.slot(b, at) for b, part in parts.items() for at in range(part.start, part.stop)]
        k, v, q = (torch.cat([rows[b][part] for b, part in parts.items()]) for rows in (self.k, self.v, self.q))
        store_kv(k, v, self.cache_k, self.cache_v, torch.tensor(slots), self.scales_k, self.scales_v)
        for b, count in chunks.items():
            self.done[b] += count
        lengths = torch.tensor([self.done[b] for b in chunks], dtype=torch.int32)
        return paged_attention(
            q, self.cache_k, self.cache_v, self.tables[list(chunks)], lengths,
            torch.tensor([0, *chunks.values()], dtype=torch.int32).cumsum(0),
            scale=0.3, scales_k=self.scales_k, scales_v=self.scales_v, **options,
        )  # fmt: skip

    def slot(self, b, at):
        return int(self.tables[b, at // BLOCK]) * BLOCK + at % BLOCK

    def rounded(self):
        """The keys and values that the pages stand for take the place of the exact ones."""
        for rows in (self.k, self.v):
            rows[:] = [(q * scale[..., None]).to(x.dtype) for x, (q, scale) in ((x, quantise(x)) for x in rows)]
        return self


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_number_is_off_by_more_than_half_a_scale(dtype):
    x = (torch.randn(300, 2, 64, dtype=torch.float64) * 10.0 ** torch.arange(-6, 6).repeat(25)[:, None, None]).to(dtype)
    q, scale = quantise(x)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (300, 2))
    error = (q.double() * scale.double()[..., None] - x.double()).abs()
    assert (error <= scale.double()[..., None] * (0.5 + 1e-5)).all()
    assert (q.abs().amax(-1) == 127).all(), "the largest of a row uses the whole range"


def test_heads_and_tokens_have_scales_of_their_own():
    x = torch.tensor([[[1.0, -2.0], [100.0, 50.0]], [[0.0, 0.0], [1e-3, 0.0]]])
    q, scale = quantise(x)
    assert q.tolist() == [[[64, -127], [127, 64]], [[0, 0], [127, 0]]]
    torch.testing.assert_close(scale, torch.tensor([[2.0, 100.0], [0.0, 1e-3]]) / 127)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_does_not_become_one(bad):
    x = torch.ones(1, 1, 4)
    x[0, 0, 2] = bad
    assert not quantise(x)[1].isfinite().any()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_reads_what_was_kept_also_within_the_chunk(form, dtype, heads, window):
    """In any chunks: packed attention of the rounded keys and values, and not of the exact ones."""
    pages = Quantised([13, 9], heads, dtype)
    exact = [pages.packed(b, window=window) for b in range(2)]
    got = {0: [], 1: []}
    for chunks in ({0: 5, 1: 9}, {0: 1}, {0: 7}):
        for b, rows in zip(chunks, pages.step(chunks, window=window).split(list(chunks.values())), strict=True):
            got[b].append(rows)
    for b, parts in got.items():
        found, rounded = torch.cat(parts), pages.rounded().packed(b, window=window)
        torch.testing.assert_close(found, rounded, rtol=1e-5, atol=1e-5)
        assert (found - exact[b]).abs().max() > 1e-4, "it was rounded at all"
        assert (found - exact[b]).abs().max() < 0.05


def test_chunked_is_whole_bit_by_bit_in_the_pages(form):
    whole, parts = Quantised([13], (6, 2)), Quantised([13], (6, 2))
    parts.q, parts.k, parts.v, parts.tables = whole.q, whole.k, whole.v, whole.tables
    whole.step({0: 13})
    for count in (5, 1, 7):
        parts.step({0: count})
    kept = [whole.slot(0, at) for at in range(13)]
    for name in ("cache_k", "cache_v", "scales_k", "scales_v"):
        of = [getattr(pages, name).flatten(0, 1)[kept] for pages in (whole, parts)]
        assert torch.equal(*of)


def test_copied_blocks_are_read_before_any_is_written():
    pages = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    before = pages.clone()
    copy_blocks(pages, torch.tensor([1, 2]), torch.tensor([2, 3]))
    assert torch.equal(pages, before[:, [0, 1, 1, 2]])
