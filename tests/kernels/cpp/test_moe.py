"""The mixture of experts in C++: a row's bits are those of the separate operations, in any company, on any CPU."""

import gc
import resource

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry
from turnout.kernels.cpp import build, moe
from turnout.kernels.torch_ops import composition

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(tokens=67, choices=2, experts=5, width=200, hidden=97, dtype=torch.bfloat16):
    torch.manual_seed(0)
    x = (2 * torch.randn(tokens, width)).to(dtype)
    ids = torch.rand(tokens, experts).topk(choices, 1).indices
    weights, kept = torch.rand(tokens, choices), torch.rand(tokens, choices) > 0.1
    w_in = (torch.randn(experts, 2 * hidden, width) / width**0.5).to(dtype)
    w_out = (torch.randn(experts, hidden, width) / hidden**0.5).to(dtype)
    return x, ids, weights, kept, w_in, w_out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_has_the_same_bits_among_any_number_of_rows(threads, dtype):
    *rows, w_in, w_out = make(dtype=dtype)
    whole = moe.moe_mlp(*rows, w_in, w_out)
    for count in (1, 2, 5, 16, 33):
        for start in (0, 31):
            some = [t[start : start + count] for t in rows]
            assert torch.equal(moe.moe_mlp(*some, w_in, w_out), whole[start : start + count]), (start, count)


def test_no_number_of_rows_changes_a_bit():
    *rows, w_in, w_out = make(130, 2, 3, 72, 37)
    whole = moe.moe_mlp(*rows, w_in, w_out)
    for count in range(1, 130):
        some = [t[130 - count :] for t in rows]
        assert torch.equal(moe.moe_mlp(*some, w_in, w_out), whole[130 - count :]), count


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 8, 8),
        (67, 2, 5, 200, 97),
        (90, 1, 1, 128, 64),
        (30, 3, 3, 33, 31),
        (130, 1, 2, 2100, 66),
        (19, 1, 2, 5000, 3),
    ],
)
def test_the_bits_are_those_of_the_separate_operations(shape, dtype):
    values = make(*shape, dtype=dtype)
    with kernels.using("cpp"), torch.no_grad():
        assert torch.equal(moe.moe_mlp(*values), composition.moe_mlp(*values))


def test_the_bits_are_the_same_stripe_by_stripe(threads, monkeypatch):
    values = make(width=600)
    whole = moe.moe_mlp(*values)
    monkeypatch.setattr(moe, "LASTING", 0)
    assert torch.equal(moe.moe_mlp(*values), whole)


def test_operands_may_be_views(threads):
    x, ids, weights, kept, w_in, w_out = make()
    whole = moe.moe_mlp(x, ids, weights, kept, w_in, w_out)
    wide_in, wide_out = torch.zeros(5, 200, 300).bfloat16(), torch.zeros(6, 100, 250).bfloat16()
    wide_in[:, :194, :200], wide_out[:5, :97, :200] = w_in, w_out
    views = wide_in[:, :194, :200], wide_out[:5, :97, :200]
    assert torch.equal(moe.moe_mlp(x.mT.contiguous().mT, ids.mT.contiguous().mT, weights, kept, *views), whole)


def test_it_runs_unasked_for_bfloat16_in_inference():
    values = make(3)
    pays = bool(build.library().turnout_moe_pairs())
    with torch.inference_mode():
        assert (registry.choose("moe_mlp", *values) == "cpp") == pays
        assert registry.choose("moe_mlp", *make(3, dtype=torch.float32)) == "torch"
        with kernels.using("cpp"):
            assert registry.choose("moe_mlp", *make(3, dtype=torch.float32)) == "cpp"
            assert registry.choose("moe_mlp", *make(3, dtype=torch.float64)) == "torch"
            assert registry.choose("moe_mlp", *values[:4], values[4].mT.contiguous().mT, values[5]) == "torch"
    with torch.no_grad():
        assert registry.choose("moe_mlp", *values) == "torch"


def test_memory_does_not_grow():
    values = make(5, width=64, hidden=32)
    for _ in range(100):
        moe.moe_mlp(*values)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        moe.moe_mlp(*values)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB


@pytest.mark.full
def test_every_instruction_set_agrees(monkeypatch):
    """Each keeps a row's bits among others; between them bits may differ."""
    if not build.INSTRUCTIONS[0][0] <= build._cpu():
        return
    found = []
    for _, flags in build.INSTRUCTIONS:
        library = build.load(flags)
        monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda library=library: library)
        alone = [make(dtype=dtype) for dtype in TYPES]
        found.append([moe.moe_mlp(*values) for values in alone])
        for values, whole in zip(alone, found[-1], strict=True):
            some = [t[30:31] for t in values[:4]]
            assert torch.equal(moe.moe_mlp(*some, *values[4:]), whole[30:31])
    pairs, wide, narrow, plain = found
    for i, dtype in enumerate(TYPES):
        loose = 1e-5 if dtype == torch.float32 else 3e-2
        for other in (pairs, narrow, plain):
            torch.testing.assert_close(other[i], wide[i], rtol=loose, atol=loose)
