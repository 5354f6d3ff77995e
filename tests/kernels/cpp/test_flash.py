"""Attention for training against the reference in float64; sums that no company changes; memory without scores."""

import itertools

import pytest
import torch

from turnout import kernels
from turnout.kernels.cpp import build, flash

MASKS = [(True, None), (False, None), (True, 17), (False, 40)]
QUICK = [(8, 8, 64, [130]), (6, 2, 128, [1]), (4, 2, 32, [1, 3, 65, 0, 64]), (3, 1, 96, [63])]
FULL = [
    (h, g, d, lengths) for h, g in ((4, 4), (6, 2), (2, 1)) for d in (32, 64, 128, 256) for lengths in ([1], [200, 64])
]


def packed(heads, kv_heads, d, lengths):
    torch.manual_seed(0)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    shapes = ((heads, d), (kv_heads, d), (kv_heads, d), (heads, d))
    return cu, *(torch.randn(sum(lengths), *shape).bfloat16() for shape in shapes)


def results(q, k, v, cu, grad, **mask):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o = kernels.varlen_attention(q, k, v, cu, scale=q.shape[-1] ** -0.5, **mask)
    return [o, *torch.autograd.grad(o, (q, k, v), grad.to(o.dtype))]


def check(heads, kv_heads, d, lengths, causal, window):
    cu, q, k, v, grad = packed(heads, kv_heads, d, lengths)
    assert flash.runs(q, k, v)
    found = results(q, k, v, cu, grad, causal=causal, window=window)
    with kernels.using("reference"):
        exact = results(q.double(), k.double(), v.double(), cu, grad, causal=causal, window=window)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() <= 6e-3 * theirs.norm()  # one key: dq is 0


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("shape", QUICK, ids=str)
def test_it_is_the_reference_with_its_gradients(shape, causal, window):
    check(*shape, causal, window)


@pytest.mark.full
@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_it_is_the_reference_over_shapes(shape, causal, window):
    check(*shape, causal, window)


def test_a_sequence_has_the_same_bits_in_any_company_and_on_any_threads():
    cu, *tensors = packed(4, 2, 64, [70, 129, 5])
    together, threads = results(*tensors[:3], cu, tensors[3]), torch.get_num_threads()
    torch.set_num_threads(1)
    for start, end in itertools.pairwise(cu.tolist()):
        q, k, v, grad = (t[start:end] for t in tensors)
        alone = results(q, k, v, torch.tensor([0, end - start]), grad)
        assert all(torch.equal(one, many[start:end]) for one, many in zip(alone, together, strict=True))
    torch.set_num_threads(threads)


def test_a_nan_stays_in_its_sequence():
    cu, q, k, v, grad = packed(2, 2, 32, [66, 4])
    k[0, 0, 0] = float("nan")
    o = results(q, k, v, cu, grad)[0]
    assert o[:66, 0].isnan().all()
    assert not o[:66, 1].isnan().any()
    assert not o[66:].isnan().any()


def test_no_scores_are_kept_for_backward():
    cu, q, k, v, _ = packed(8, 8, 64, [256])
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        kernels.varlen_attention(q.requires_grad_(), k, v, cu, scale=0.125)
    assert sum(t.nbytes for t in kept.values()) == 4 * q.nbytes + 4 * 256 * 8 + 2 * cu.nbytes - cu.nbytes


@pytest.mark.full
@pytest.mark.parametrize("flags", [flags for _, flags in build.INSTRUCTIONS[1:]], ids=["avx512", "avx2", "none"])
def test_other_instructions_compute_the_same_within_rounding(flags, monkeypatch):
    if not {"avx512f", "avx2", "fma", "f16c"} <= build._cpu():
        return
    library = build.load(flags)
    monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda: library)
    check(4, 2, 64, [100, 7], True, None)
