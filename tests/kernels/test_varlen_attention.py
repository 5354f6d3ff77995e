"""Packed attention against a loop over queries in float64."""

import math

import pytest
import torch

from turnout import kernels
from turnout.kernels import varlen_attention

LENGTHS = {
    "none": [],
    "one token": [1],
    "equal": [6, 6, 6],
    "mixed": [3, 1, 8, 8, 5],
    "empty between": [4, 0, 0, 7],
    "only empty": [0, 0],
}
HEADS = {"multi head": (4, 4), "grouped": (6, 2), "multi query": (4, 1)}


def make(lengths, heads, dtype=torch.float32, d=8, dv=8):
    H, G = heads
    T = sum(lengths)
    q, k, v = torch.randn(T, H, d), torch.randn(T, G, d), torch.randn(T, G, dv)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return *(t.to(dtype) for t in (q, k, v)), cu


def query_by_query(q, k, v, cu, *, scale, causal=True, window=None):
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    rows = [q.new_zeros(0, q.shape[1], v.shape[2])]
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for i in range(start, end):
            seen = [j for j in range(start, end) if (j <= i or not causal) and (window is None or abs(i - j) < window)]
            heads = []
            for h in range(q.shape[1]):
                scores = torch.stack([q[i, h] @ k[j, h // group] for j in seen]) * scale
                heads.append((scores.softmax(0)[:, None] * v[seen, h // group]).sum(0))
            rows.append(torch.stack(heads)[None])
    return torch.cat(rows)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 1}, {"window": 3}, {"window": 3, "causal": False}]
)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_sequence_attends_to_itself_alone(form, lengths, heads, options):
    q, k, v, cu = make(lengths, heads)
    out = varlen_attention(q, k, v, cu, scale=0.3, **options)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), query_by_query(q, k, v, cu, scale=0.3, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"causal": False}])
def test_gradients_are_those_of_the_float64_loop(form, heads, dtype, options):
    q, k, v, cu = make([4, 4, 3], heads, dtype)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    grad = torch.randn(q.shape, dtype=dtype)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    truths = torch.autograd.grad(query_by_query(*exact, cu, scale=0.3, **options), exact, grad.double())
    got = torch.autograd.grad(varlen_attention(*inputs, cu, scale=0.3, **options), inputs, grad)
    for value, truth in zip(got, truths, strict=True):
        assert value.dtype == dtype
        assert (value.double() - truth).norm() < (1e-6 if dtype == torch.float32 else 2e-2) * truth.norm()


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_gradcheck(form, heads):
    q, k, v, cu = make([2, 2, 3], heads, torch.float64, d=3)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attention(q, k, v, cu, scale=0.5, window=2), inputs)


KEYS = {  # queries and keys of each sequence
    "suffixes": ([3, 2, 2, 4], [7, 5, 5, 4]),
    "no queries": ([0, 3, 0], [4, 3, 0]),
    "one query each": ([1, 1], [6, 1]),
}


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 2, "causal": False}, {"causal": False}])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(("queries", "keys"), KEYS.values(), ids=KEYS)
def test_fewer_queries_than_keys_are_the_last_of_their_sequence(form, queries, keys, heads, options):
    q, k, v, cu_k = make(keys, heads, torch.float64)
    cu = torch.tensor([0, *queries]).cumsum(0)
    last = torch.cat([torch.arange(end - n, end) for n, end in zip(queries, cu_k[1:].tolist(), strict=True)])
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    truth = query_by_query(q, k, v, cu_k, scale=0.3, **options)[last]
    out = varlen_attention(q[last], k, v, cu, scale=0.3, cu_k_B1=cu_k, **options)
    torch.testing.assert_close(out, truth)
    grad = torch.randn(truth.shape, dtype=torch.float64)
    found, expected = (torch.autograd.grad(o, inputs, grad) for o in (out, truth))
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact)


def test_half_precision_gradients_of_fewer_queries_than_keys(form):
    q, k, v, cu_k = make([6, 6, 5], (4, 2), torch.bfloat16)
    cu, last = torch.tensor([0, 2, 4, 7]), torch.tensor([4, 5, 10, 11, 14, 15, 16])
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    truth = query_by_query(*exact, cu_k, scale=0.3)[last]
    grad = torch.randn(truth.shape).bfloat16()
    out = varlen_attention(q[last], k, v, cu, scale=0.3, cu_k_B1=cu_k)
    found, expected = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(truth, exact, grad.double())
    for value, right in zip(found, expected, strict=True):
        assert (value.double() - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_backward_pass_reaches_keys_and_values_where_there_is_nothing_to_attend_to(form, lengths):
    q, k, v, cu = make(lengths, (4, 2), dv=5)
    for x in (q, k, v):
        x.requires_grad_()
    keys, values = (torch.cat((x, torch.zeros(3, *x.shape[1:]))) for x in (k, v))  # of sequences without queries
    for more, cu_k in (((k, v), None), ((keys, values), torch.tensor([*cu[:-1].tolist(), 3]))):
        o = varlen_attention(q, *more, cu, scale=1.0, causal=False, cu_k_B1=cu_k if lengths else None)
        assert o.shape == (0, 4, 5)
        assert all(g is not None for g in torch.autograd.grad(o.sum(), (q, k, v), allow_unused=True))


def test_values_may_be_narrower_than_keys(form):
    q, k, v, cu = make([5, 3], (4, 2), dv=3)
    out = varlen_attention(q, k, v, cu, scale=0.3)
    torch.testing.assert_close(out.double(), query_by_query(q, k, v, cu, scale=0.3), rtol=1e-5, atol=1e-5)


def test_half_precision_scores_are_summed_in_float32(form):
    # scores 64 and 64.25 differ by less than bfloat16 can tell there; the weights must still differ
    q = torch.tensor([[[8.0, 0.5]]]).expand(2, 1, 2).bfloat16()
    k = torch.tensor([[[8.0, 0.0]], [[8.0, 0.5]]]).bfloat16()
    v = torch.tensor([[[0.0]], [[1.0]]]).bfloat16()
    out = varlen_attention(q, k, v, torch.tensor([0, 2]), scale=1.0)
    assert out[1].item() == pytest.approx(1 / (1 + math.exp(-0.25)), abs=2e-3)


def test_autocast_casts_the_operands(form):
    q, k, v, cu = make([5, 3], (4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention(q, k, v, cu, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, varlen_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu, scale=0.3))


def test_sequences_too_long_to_write_out_agree_with_the_reference():
    q, k, v, cu = make([600, 600, 50], (2, 1), torch.bfloat16)
    long = make([3000], (1, 1), torch.bfloat16)
    for operands in ((q, k, v, cu), long):
        with kernels.using("reference"):
            truth = varlen_attention(*operands, scale=0.3)
        out = varlen_attention(*operands, scale=0.3)
        assert (out - truth).float().norm() < 1e-2 * truth.float().norm()


def test_two_runs_give_the_same_bits(form):
    q, k, v, cu = make([9, 9, 4], (4, 2), torch.bfloat16)
    q.requires_grad_()

    def run():
        out = varlen_attention(q, k, v, cu, scale=0.3)
        return out, *torch.autograd.grad(out.float().square().sum(), q)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.full
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("heads", [*HEADS.values(), (8, 4), (1, 1)])
@pytest.mark.parametrize("d", [1, 8, 32, 80])
@pytest.mark.parametrize("lengths", [[1, 2, 3, 5, 8, 13], [33], [16, 16, 1, 16]])
def test_shape_grid(form, lengths, d, heads, window):
    q, k, v, cu = make(lengths, heads, d=d, dv=d)
    truth = query_by_query(q, k, v, cu, scale=d**-0.5, window=window)
    out = varlen_attention(q, k, v, cu, scale=d**-0.5, window=window)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
