"""Batch-invariant forms: a row's bits are the same among any number of rows, and in pages as packed."""

# ruff: noqa: N802 (S0 and TS are names of rules)

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from turnout import kernels
from turnout.kernels.registry import choose

COUNTS = (1, 2, 3, 5, 7, 8, 63, 64, 65)
TYPES = [torch.float32, torch.bfloat16, torch.float16]
K, M, E = 100, 72, 3


@pytest.fixture(params=["invariant", "rows"])
def form(request):
    with kernels.using(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def grouped(layout, x_NK):
    """Rows alternate between two of three experts, so that those of one row's company change with their number."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(E, K, M, generator=generator) if layout == "rows" else torch.randn(E, M, K, generator=generator).mT
    order = torch.arange(len(x_NK)).remainder(2).argsort(stable=True)
    odd = len(x_NK) // 2
    ends = torch.tensor([len(x_NK) - odd, len(x_NK) - odd, len(x_NK)], dtype=torch.int32)
    y_NM = torch.empty(len(x_NK), M, dtype=x_NK.dtype)
    y_NM[order] = kernels.grouped_gemm(x_NK[order], w.to(x_NK.dtype), ends)
    return y_NM


def weight(*shape, like):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(like.dtype)


OPERATIONS = {
    "linear": lambda x: kernels.linear(x, weight(M, K, like=x), weight(M, like=x)),
    "linear by columns": lambda x: kernels.linear(x, weight(K, M, like=x).mT),
    "grouped_gemm by columns": partial(grouped, "columns"),
    "grouped_gemm by rows": partial(grouped, "rows"),
    "head_gemm": lambda x: kernels.head_gemm(x.unflatten(1, (4, 25)), weight(4, 25, 9, like=x)),
    "rms_norm": lambda x: kernels.rms_norm(x, weight(K, like=x), 1e-5),
    "swiglu": kernels.swiglu,
    "rope": lambda x: kernels.rope(x.unflatten(1, (5, 20)), torch.full((len(x),), 77), torch.rand(10) ** 3),
    "sigmoid": partial(kernels.pointwise, torch.sigmoid),
    "gelu": partial(kernels.pointwise, F.gelu),
    "log sigmoid": partial(kernels.pointwise, F.logsigmoid),
    "softmax": lambda x: x.softmax(-1),  # the router's: PyTorch's own treats rows alike, which is held here
    "log softmax": lambda x: x.log_softmax(-1),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_S0_a_row_has_the_same_bits_among_any_number_of_rows(form, threads, name, dtype):
    operation, x = OPERATIONS[name], (3 * torch.randn(max(COUNTS), K)).to(dtype)
    torch.manual_seed(0)
    whole = operation(x)
    for count in COUNTS:
        for start in {0, 1, len(x) - count} if count < len(x) else {0}:  # an odd start is another expert's row
            torch.manual_seed(0)
            own = whole[start : start + count]
            if name.startswith("grouped") and start % 2:
                continue
            assert torch.equal(operation(x[start : start + count]), own), (count, start)


@pytest.mark.full  # another CPU's library may keep it
def test_S0_the_librarys_products_have_other_bits_among_other_rows():
    """What the forms above are for; where a library learns better, they can go."""
    x, w = torch.randn(64, 512), torch.randn(512, 512)
    whole = F.linear(x, w)
    assert any(not torch.equal(F.linear(x[:count], w), whole[:count]) for count in (1, 2, 3, 5, 7))
    assert any(not torch.equal(torch.sigmoid(x[:, :count]), torch.sigmoid(x)[:, :count]) for count in range(1, 9))


def test_invariant_prefers_cpp_and_falls_back_for_what_it_does_not_fit():
    x, w = torch.randn(2, 8), torch.randn(3, 8).requires_grad_()
    assert choose("linear", x, w) == "torch"
    with kernels.using("invariant"):
        assert choose("linear", x, w) == "cpp"
        assert choose("linear", x.double(), w.double()) == "rows"
        assert choose("rope", x[:, None], torch.zeros(2), torch.ones(4)) == "rows"
        with kernels.using(None):
            assert choose("linear", x, w) == "cpp"


def test_a_row_that_is_not_finite_spoils_no_other(form):
    x, w = torch.randn(9, K), torch.randn(M, K)
    clean = kernels.linear(x, w), kernels.swiglu(x), kernels.rms_norm(x, torch.ones(K), 1e-5)
    x[4, 7], x[4, 8] = torch.nan, torch.inf
    for before, after in zip(
        clean, (kernels.linear(x, w), kernels.swiglu(x), kernels.rms_norm(x, torch.ones(K), 1e-5)), strict=True
    ):
        assert after[4].isnan().any()
        others = torch.arange(9) != 4
        assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_is_right_far_from_zero(form, dtype):
    gate = torch.tensor([-1e4, -200, -100, -88, -87, -20, -1, 0, 1e-3, 20, 88, 100, 1e4] * 2)
    x = torch.cat((gate, torch.ones_like(gate)))[None].to(dtype)
    expected = F.silu(x[:, : len(gate)].double())
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(kernels.swiglu(x).double(), expected, rtol=bound, atol=1e-30)


def test_gradients_are_those_of_the_library(form):
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((5, K), (M, K), (M,)))
    found = torch.autograd.grad(kernels.linear(x, w, b).square().sum(), (x, w, b))
    with kernels.using("torch"):
        expected = torch.autograd.grad(kernels.linear(x, w, b).square().sum(), (x, w, b))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_autocast_casts_the_operands(form):
    x, w = torch.randn(5, K), torch.randn(M, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.linear(x, w)
    assert torch.equal(y, kernels.linear(x.bfloat16(), w.bfloat16()))


PATTERNS = {
    "causal": {},
    "window": {"window": 5},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0])},
    "biases by distance": {"bias_HR": torch.linspace(-2, 2, 6 * 21).view(6, 21), "window": 30},
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("widths", [(24, 24), (40, 24), (72, 64)])
def test_TS_pages_in_any_chunks_and_company_give_the_bits_of_packed_rows(form, pattern, widths, dtype):
    (d, d_v), page, lengths, options = widths, 4, (37, 5, 16), PATTERNS[pattern]
    q, k, v = (torch.randn(sum(lengths), *shape).to(dtype) for shape in ((6, d), (2, d), (2, d_v)))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = kernels.varlen_attention(q, k, v, cu, scale=0.3, **options)
    tables = 1 + torch.randperm(30).view(3, 10)
    cache_k, cache_v = (
        torch.full((31, page, 2, d), torch.nan, dtype=dtype),
        torch.full((31, page, 2, d_v), torch.nan, dtype=dtype),
    )
    done = [0, 0, 0]
    for chunks in ((36, 0, 3), (1, 1, 1), (0, 4, 5), (0, 0, 7)):
        rows = torch.cat([torch.arange(cu[b] + done[b], cu[b] + done[b] + n) for b, n in enumerate(chunks)])
        at = torch.cat([torch.arange(done[b], done[b] + n) for b, n in enumerate(chunks)])
        owner = torch.arange(3).repeat_interleave(torch.tensor(chunks))
        kernels.store_kv(k[rows], v[rows], cache_k, cache_v, tables[owner, at // page] * page + at % page)
        done = [before + n for before, n in zip(done, chunks, strict=True)]
        starts = torch.tensor([0, *chunks]).cumsum(0)
        found = kernels.paged_attention(
            q[rows], cache_k, cache_v, tables, torch.tensor(done), starts, scale=0.3, **options
        )  # fmt: skip
        assert torch.equal(found, packed[rows]), chunks
