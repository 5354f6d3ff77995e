"""Attention through pages equals packed attention of the whole text, in any chunks and any company."""

import pytest
import torch

from turnout.kernels import paged_attention, store_kv, varlen_attention

BLOCK = 4
HEADS = {"multi head": (4, 4), "grouped": (6, 2), "multi query": (4, 1)}


class Pages:
    """A small cache whose unwritten pages hold NaN, and sequences with shuffled block tables."""

    def __init__(self, lengths, heads, dtype=torch.float32, d=8):
        H, G = heads
        self.q, self.k, self.v = ([torch.randn(n, h, d).to(dtype) for n in lengths] for h in (H, G, G))
        most = -(-max(lengths) // BLOCK)
        blocks = 1 + torch.randperm(len(lengths) * most)  # block 0 is the null block
        self.tables = blocks.view(len(lengths), most)
        for b, n in enumerate(lengths):
            self.tables[b, -(-n // BLOCK) :] = 10**6  # never to be read
        shape = (len(blocks) + 1, BLOCK, G, d)
        self.cache_k, self.cache_v = (
            torch.full(shape, torch.nan, dtype=dtype),
            torch.full(shape, torch.nan, dtype=dtype),
        )
        self.done = [0] * len(lengths)

    def step(self, chunks, **options):
        """Store and attend the next `count` tokens of each sequence in `chunks` (b → count)."""
        parts = {b: slice(self.done[b], self.done[b] + count) for b, count in chunks.items()}
        slots = [
            self.tables[b, at // BLOCK] * BLOCK + at % BLOCK
            for b, part in parts.items()
            for at in range(part.start, part.stop)
        ]
        k, v, q = (torch.cat([rows[b][part] for b, part in parts.items()]) for rows in (self.k, self.v, self.q))
        store_kv(k, v, self.cache_k, self.cache_v, torch.tensor(slots, dtype=torch.int64))
        for b, count in chunks.items():
            self.done[b] += count
        return paged_attention(
            q,
            self.cache_k,
            self.cache_v,
            self.tables[list(chunks)],
            torch.tensor([self.done[b] for b in chunks], dtype=torch.int32),
            torch.tensor([0, *chunks.values()], dtype=torch.int32).cumsum(0),
            scale=0.3,
            **options,
        )

    def packed(self, b, **options):
        cu = torch.tensor([0, len(self.q[b])])
        return varlen_attention(self.q[b], self.k[b], self.v[b], cu, scale=0.3, **options)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("first", [1, 3, 4, 5, 8, 9])
def test_chunked_prefill_and_decode_equal_packed_attention_around_block_borders(form, first, heads, window):
    lengths = [first + 7, 9, first + 3]
    pages = Pages(lengths, heads)
    got = {b: [] for b in range(3)}
    steps = [{0: first}, {1: 4, 2: first - 1}, {0: 1, 1: 1}, {0: 1, 1: 3, 2: 1}, {2: 2, 1: 0}, {0: 5, 1: 1, 2: 1}]
    for chunks in steps:
        out = pages.step(chunks, window=window)
        for b, rows in zip(chunks, out.split(list(chunks.values())), strict=True):
            got[b].append(rows)
    for b, parts in got.items():
        torch.testing.assert_close(torch.cat(parts), pages.packed(b, window=window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_feel_its_batch_mates(form, dtype):
    lengths = [3, 4, 5, 17, 40]
    together, alone = Pages(lengths, (6, 2), dtype), None
    alone = Pages(lengths, (6, 2), dtype)
    alone.q, alone.k, alone.v = together.q, together.k, together.v
    together.step({b: n - 1 for b, n in enumerate(lengths)})
    decoded = together.step(dict.fromkeys(range(5), 1))
    for b, n in enumerate(lengths):
        alone.step({b: n - 1})
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(decoded[b : b + 1], alone.step({b: 1}), rtol=bound, atol=bound)


def test_stale_pages_are_never_read(form):
    pages = Pages([6, 2], (4, 2))
    pages.step({0: 5, 1: 1})
    assert pages.cache_v.isnan().any()
    assert pages.step({0: 1, 1: 1}).isfinite().all()


def test_a_huge_window_and_none_are_the_same(form):
    pages = Pages([9], (4, 2))
    pages.step({0: 8})
    last = pages.step({0: 1}, window=9)
    pages.done[0] -= 1
    assert torch.equal(pages.step({0: 1}), last)


def test_half_precision_pages_serve_wider_queries(form):
    pages = Pages([7], (4, 2))
    exact = pages.packed(0)
    pages.cache_k, pages.cache_v = pages.cache_k.bfloat16(), pages.cache_v.bfloat16()
    out = pages.step({0: 7})
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)


def test_a_step_without_tokens_gives_no_rows(form):
    pages = Pages([3], (4, 2))
    empty = torch.empty(0, dtype=torch.int64)
    tables = pages.tables[:0]
    none = paged_attention(pages.q[0][:0], pages.cache_k, pages.cache_v, tables, empty, torch.zeros(1).int(), scale=1.0)
    assert none.shape == (0, 4, 8)
    store_kv(pages.k[0][:0], pages.v[0][:0], pages.cache_k, pages.cache_v, empty)
    assert pages.cache_k.isnan().all()


def test_store_writes_its_slots_and_no_others():
    cache_k, cache_v = torch.zeros(3, BLOCK, 2, 5), torch.zeros(3, BLOCK, 2, 5)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    store_kv(k, v, cache_k, cache_v, torch.tensor([4, 11, 2]))
    assert torch.equal(cache_k[1, 0], k[0])
    assert torch.equal(cache_v[2, 3], v[1])
    assert torch.equal(cache_k[0, 2], k[2])
    assert (cache_k.flatten(0, 1).abs().sum((1, 2)) > 0).sum() == 3


@pytest.mark.full
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 4, 5])
@pytest.mark.parametrize("length", range(1, 14))
def test_every_split_of_every_length(form, length, window, heads):
    pages = Pages([length], heads)
    truth = pages.packed(0, window=window)
    for split in range(length):
        pages.done[0] = 0
        parts = [pages.step({0: count}, window=window) for count in (split, length - split) if count]
        torch.testing.assert_close(torch.cat(parts), truth, rtol=1e-5, atol=1e-5)
