"""Attention with sinks and biases by distance, packed and through pages, against a loop in float64."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from turnout import kernels
from turnout.kernels import paged_attention, store_kv, varlen_attention

BLOCK = 4
HEADS = {"multi head": (4, 4), "grouped": (6, 2), "multi query": (4, 1)}
LEARNED = {"sinks": (True, False), "bias": (False, True), "both": (True, True)}
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SEQUENCES = {  # queries and keys of each sequence, causal
    "packed": ([3, 1, 6, 6, 0, 5], [3, 1, 6, 6, 0, 5], True),
    "both ways": ([3, 6, 6, 0], [3, 6, 6, 0], False),
    "suffixes": ([3, 2, 2, 0], [7, 5, 5, 4], True),
    "memory": ([5, 2, 0, 9], [3, 7, 4, 3], False),  # a decoder's queries and an encoder's keys
}


def query_by_query(q, k, v, cu_q, cu_k, *, causal, window, sinks=None, bias=None, scale=0.3):
    """What `varlen_attention` promises, one query and head at a time."""
    q, k, v = (t.double() for t in (q, k, v))
    group, rows = q.shape[1] // k.shape[1], [q.new_zeros(0, q.shape[1], v.shape[2])]
    for (start, end), (first, last) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        for i in range(start, end):
            at = i - start + (last - first) - (end - start)
            seen = [
                j for j in range(last - first) if (j <= at or not causal) and (window is None or abs(j - at) < window)
            ]
            heads = []
            for h in range(q.shape[1]):
                there = torch.tensor(seen, dtype=torch.int64)
                scores = scale * k[first + there, h // group] @ q[i, h]
                if bias is not None:
                    M = bias.shape[1] // 2
                    scores = scores + torch.stack([bias[h, max(-M, min(M, j - at)) + M] for j in seen]).double()
                weights = scores.exp() / (scores.exp().sum() + (0 if sinks is None else sinks[h].double().exp()))
                heads.append(weights @ v[first + there, h // group])
            rows.append(torch.stack(heads)[None])
    return torch.cat(rows)


def make(queries, keys, heads, learned, dtype, d=8):
    (H, G), cu = heads, [[0, *itertools.accumulate(lengths)] for lengths in (queries, keys)]
    sizes = ((sum(queries), H, d), (sum(keys), G, d), (sum(keys), G, d))
    qkv = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    parameter = torch.promote_types(dtype, torch.float32)  # these stay float32 under autocast
    sinks = torch.randn(H, dtype=parameter, requires_grad=True) if learned[0] else None
    bias = torch.randn(H, 7, dtype=parameter, requires_grad=True) if learned[1] else None
    return qkv, cu, sinks, bias


def tensors(cu):
    return {"cu_seqlens_B1": torch.tensor(cu[0]), "cu_k_B1": torch.tensor(cu[1])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "causal"), SEQUENCES.values(), ids=SEQUENCES)
def test_packed_attention_and_all_gradients_are_the_loops(form, queries, keys, causal, dtype):
    check(queries, keys, causal, 3, (6, 2), (True, causal or queries == keys), dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", LEARNED.values(), ids=LEARNED)
@pytest.mark.parametrize(("queries", "keys", "causal"), SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("window", [None, 1, 2, 50])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_way_of_packed_attention(form, heads, queries, keys, causal, window, learned, dtype):
    check(queries, keys, causal, window, heads, learned, dtype)


def check(queries, keys, causal, window, heads, learned, dtype):
    window = window if causal or queries == keys else None  # memory has no window
    qkv, cu, sinks, bias = make(queries, keys, heads, learned, dtype)
    given = [t for t in (*qkv, sinks, bias) if t is not None]
    truth = query_by_query(*qkv, *cu, causal=causal, window=window, sinks=sinks, bias=bias)
    out = varlen_attention(*qkv, **tensors(cu), scale=0.3, causal=causal, window=window, sinks_H=sinks, bias_HR=bias)
    assert out.dtype == dtype
    grad, bound = torch.randn(out.shape).to(dtype), DTYPES[dtype]
    found = torch.autograd.grad(out, given, grad)
    expected = torch.autograd.grad(truth, given, grad.double())
    for value, right in ((out, truth), *zip(found, expected, strict=True)):
        # a query that sees one key alone has a gradient of zero: what the loop leaves of it is its own rounding
        assert (value.double() - right.double()).norm() <= bound * right.double().norm() + 1e-13


def test_a_query_without_keys_gets_nothing(form):
    qkv, cu, sinks, _ = make([2, 1], [0, 3], (4, 2), (True, False), torch.float32)
    for learned in (None, sinks):
        out = varlen_attention(*qkv, **tensors(cu), scale=1.0, causal=False, sinks_H=learned)
        assert (out[:2] == 0).all()
        assert out[2].abs().sum() > 0


def test_a_huge_sink_takes_all_and_a_low_one_nothing(form):
    qkv, cu, _, _ = make([4], [4], (4, 2), (False, False), torch.float32)
    plain = varlen_attention(*qkv, **tensors(cu), scale=0.3)
    for value, truth in ((-1e4, plain), (1e4, torch.zeros_like(plain))):
        out = varlen_attention(*qkv, **tensors(cu), scale=0.3, sinks_H=torch.full((4,), value))
        torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-6)


def test_half_precision_rounds_neither_sinks_nor_biases(form):
    # in bfloat16, 64 and 64.25 are one number: half of the weight each, instead of 0.56 and 0.44
    zeros, v = torch.zeros(2, 1, 2).bfloat16(), torch.tensor([[[1.0]], [[1.0]]]).bfloat16()
    more = torch.tensor([64.0]), torch.full((1, 3), 64.25)
    out = varlen_attention(zeros, zeros, v, torch.tensor([0, 2]), scale=1.0, sinks_H=more[0], bias_HR=more[1])
    assert out[0].item() == pytest.approx(1 / (1 + torch.tensor(-0.25).exp().item()), abs=3e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_pages_give_what_the_loop_gives(form, causal, window, dtype):
    check_pages([1, 1, 4, 0, 2], [1, 14, 4, 5, 11], causal, window, (6, 2), (True, True), dtype)


@pytest.mark.parametrize("learned", [(True, False), (False, False)])
def test_pages_of_a_memory_may_be_fewer_than_queries_or_none(form, learned):
    check_pages([3, 1, 1, 2], [0, 2, 0, 1], False, None, (4, 2), learned, torch.float32)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [*LEARNED.values(), (False, False)])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 6, 50])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("causal", [True, False])
def test_every_way_of_pages(form, causal, heads, window, learned, dtype):
    for queries, keys in (([1, 1, 1, 4], [1, 9, 14, 4]), ([3, 1, 0, 2], [11, 6, 5, 3])):
        check_pages(queries, keys, causal, window, heads, learned, dtype)


def check_pages(queries, keys, causal, window, heads, learned, dtype):
    qkv, cu, sinks, bias = make(queries, keys, heads, learned, dtype)
    truth = query_by_query(*qkv, *cu, causal=causal, window=window, sinks=sinks, bias=bias)
    caches_and_tables = pages(qkv[1], qkv[2], keys, window, queries)
    out = paged_attention(
        qkv[0], *caches_and_tables, torch.tensor(keys, dtype=torch.int32), torch.tensor(cu[0]),
        scale=0.3, causal=causal, window=window, sinks_H=sinks, bias_HR=bias,
    )  # fmt: skip
    assert out.dtype == dtype
    assert (out.double() - truth).norm() <= DTYPES[dtype] * truth.norm()


def pages(k, v, lengths, window, queries):
    """A cache in which all that no query may see is NaN: past contexts, other pages, and what has left the window."""
    most = max(-(-max(lengths) // BLOCK), 1)
    tables = (1 + torch.randperm(len(lengths) * most)).view(len(lengths), most)
    caches = [torch.full((1 + tables.numel(), BLOCK, *t.shape[1:]), torch.nan, dtype=t.dtype) for t in (k, v)]
    starts = [0, *itertools.accumulate(lengths)]
    for b, (n, count) in enumerate(zip(lengths, queries, strict=True)):
        gone = 0 if window is None else max(n - count - window + 1, 0)
        at = torch.arange(gone, n)
        rows = slice(starts[b] + gone, starts[b] + n)
        store_kv(k.detach()[rows], v.detach()[rows], *caches, tables[b, at // BLOCK] * BLOCK + at % BLOCK)
        tables[b, : gone // BLOCK] = 10**6  # pages that may have been given away
    return *caches, tables


def test_a_window_reads_its_own_pages_only():
    length, read = 64, []
    qkv, _, _, _ = make([1, 1], [length, length], (4, 2), (False, False), torch.float32)
    caches = pages(qkv[1], qkv[2], [length, length], None, [1, 1])

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.index_select.default:
                read.append(len(args[2]))
            return function(*args, **(kwargs or {}))

    for window in (None, 5):
        with Counted(), kernels.using("torch"):
            paged_attention(
                qkv[0].detach(), *caches, torch.tensor([length] * 2), torch.tensor([0, 1, 2]), scale=0.3, window=window
            )
    assert read == [2 * length] * 2 + [2 * 5] * 2
