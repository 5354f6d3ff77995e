"""The C++ matrix products: right in every shape and layout, and one order of sums whatever lies about a row."""

import resource

import pytest
import torch

from turnout import kernels
from turnout.kernels.cpp import build, products
from turnout.kernels.registry import _forced, choose

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# rows and columns about the borders of tiles, strips and tasks
SIZES = (0, 1, 2, 3, 5, 6, 7, 15, 16, 17, 31, 33, 64, 65, 383, 385)


@pytest.fixture(autouse=True)
def _cpp():
    with kernels.using("cpp"):
        yield


@pytest.fixture(params=[flags for _, flags in build.INSTRUCTIONS], ids=["bf16", "avx512", "avx2", "plain"])
def tier(request, monkeypatch):
    needed = next(needed for needed, flags in build.INSTRUCTIONS if flags == request.param)
    if needed <= build._cpu():  # this CPU's best tier runs in its place where it lacks one
        library = build.load(request.param)
        monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda: library)


def close(y, truth, dtype, most=None):
    """Relative to `most`, the sums of the absolute values, where those are few enough to cancel out."""
    assert y.dtype == dtype
    assert y.shape == truth.shape
    assert not y.isnan().any()
    scale = (truth if most is None else most).norm().clamp_min(1e-30)
    assert (y.double() - truth).norm() / scale < BOUNDS[dtype]


def operands(T, K, M, dtype, by_columns):
    x = torch.randn(T, K).to(dtype)
    w_MK = torch.randn(M, K).to(dtype)
    return x, w_MK.mT.contiguous().mT if by_columns else w_MK


def check(T, K, M, dtype, by_columns, bias=True):
    x, w = operands(T, K, M, dtype, by_columns)
    b = torch.randn(M).to(dtype) if bias else None
    truth = x.double() @ w.double().mT + (0 if b is None else b.double())
    most = x.double().abs() @ w.double().abs().mT + (0 if b is None else b.double().abs())
    close(kernels.linear(x, w, b), truth, dtype, most)


@pytest.mark.parametrize("by_columns", [False, True], ids=["dot", "axpy"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_linear_is_the_product_at_every_border(dtype, by_columns):
    for T in SIZES:
        check(T, 33, 37, dtype, by_columns)
    for K in SIZES[:-2]:
        check(3, K, 20, dtype, by_columns, bias=K > 0)
    for M in SIZES:
        check(5, 40, M, dtype, by_columns)


@pytest.mark.full
@pytest.mark.parametrize("by_columns", [False, True], ids=["dot", "axpy"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_tier_is_right_and_keeps_a_rows_bits(tier, dtype, by_columns):
    for T in SIZES:
        for K in (1, 2, 31, 32, 33, 100):
            for M in (1, 3, 4, 31, 64, 65, 300):
                check(T, K, M, dtype, by_columns)
    x, w = operands(450, 101, 70, dtype, by_columns)
    whole = kernels.linear(x, w)
    for count in range(1, 40):
        assert torch.equal(kernels.linear(x[3 : 3 + count], w), whole[3 : 3 + count])


@pytest.mark.parametrize("by_columns", [False, True], ids=["dot", "axpy"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_row_and_a_column_have_their_bits_among_any_others(dtype, by_columns):
    x, w = operands(420, 101, 70, dtype, by_columns)
    whole = kernels.linear(x, w)
    for start, count in ((0, 1), (7, 2), (1, 4), (5, 6), (0, 9), (2, 16), (3, 17), (9, 50), (1, 390)):
        assert torch.equal(kernels.linear(x[start : start + count], w), whole[start : start + count]), count
    for first, last in ((0, 1), (3, 8), (5, 70), (1, 66)):
        assert torch.equal(kernels.linear(x[:7], w[first:last]), whole[:7, first:last]), (first, last)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads):
    x, w = torch.randn(70, 256).bfloat16(), torch.randn(3000, 256).bfloat16()
    before = torch.get_num_threads()
    alone = {}
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            alone[count] = [kernels.linear(x[:rows], w) for rows in (1, 8, 70)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone[1], alone[threads], strict=True))


def test_sums_have_the_order_that_is_promised():
    """Products of bfloat16 numbers are exact in float32, so plain additions tell what fused ones must give."""
    x, w = torch.randn(67).bfloat16().float(), torch.randn(67).bfloat16().float()
    products_K = torch.nn.functional.pad(x * w, (0, 13))
    lanes = torch.zeros(16)
    for step in products_K.view(5, 16):
        lanes = lanes + step
    while len(lanes) > 1:  # the tree: i with i + half
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    assert kernels.linear(x[None], w[None]).item() == lanes.item()
    total = torch.zeros(())
    for product in products_K:
        total = total + product
    assert kernels.linear(x[None], torch.stack((w, w), 1).mT)[0, 0].item() == total.item()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rows_lie_where_they_lie(dtype):
    wide, w = torch.randn(9, 80).to(dtype), torch.randn(20, 40).to(dtype)
    part = wide[::2, 3:43]
    assert torch.equal(kernels.linear(part, w), kernels.linear(part.contiguous(), w))
    assert torch.equal(kernels.linear(wide.unflatten(1, (2, 40)), w)[:, 1], kernels.linear(wide[:, 40:], w))
    assert torch.equal(kernels.linear(wide[0, :40], w), kernels.linear(wide[:1, :40], w)[0])
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    w_EKM = torch.randn(3, 40, 24).to(dtype)
    assert torch.equal(kernels.grouped_gemm(part, w_EKM, ends), kernels.grouped_gemm(part.contiguous(), w_EKM, ends))


@pytest.mark.parametrize("by_columns", [False, True], ids=["dot", "axpy"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("T", [0, 1, 2, 17, 40])
def test_head_gemm_is_each_heads_product_and_that_of_linear(T, dtype, by_columns):
    H, K, M = 3, 33, 40
    both = torch.randn(H, 2 * K, M).to(dtype)[:, K:] if by_columns else torch.randn(H, 2 * M, K).to(dtype)[:, M:].mT
    x = torch.randn(T, H, K + 5).to(dtype)[..., 5:]
    y = kernels.head_gemm(x, both)
    close(y, torch.einsum("thk,hkm->thm", x.double(), both.double()), dtype)
    for h in range(H):
        assert torch.equal(y[:, h], kernels.linear(x[:, h].contiguous(), both[h].mT))


@pytest.mark.parametrize("by_columns", [False, True], ids=["dot", "axpy"])
def test_experts_have_the_bits_of_linear(by_columns):
    sizes = (0, 40, 1, 0, 17, 3)
    w = torch.randn(6, 64, 72).bfloat16() if by_columns else torch.randn(6, 72, 64).bfloat16().mT
    x = torch.randn(sum(sizes), 64).bfloat16()
    y = kernels.grouped_gemm(x, w, torch.tensor(sizes).cumsum(0).int())
    parts = [kernels.linear(rows, w_KM.mT) for rows, w_KM in zip(x.split(sizes), w, strict=True)]
    assert torch.equal(y, torch.cat(parts))


def test_head_gemm_has_the_librarys_gradients():
    x, w = torch.randn(5, 2, 8, requires_grad=True), torch.randn(2, 8, 6, requires_grad=True)
    found = torch.autograd.grad(kernels.head_gemm(x, w).square().sum(), (x, w))
    with kernels.using("torch"):
        expected = torch.autograd.grad(kernels.head_gemm(x, w).square().sum(), (x, w))
    torch.testing.assert_close(found, expected)


def test_ours_run_unasked_in_inference_and_while_they_are_faster(monkeypatch):
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    many = torch.randn(products.ONE + 1, 64)
    ends = torch.tensor([4], dtype=torch.int32)
    monkeypatch.setattr(products, "_measured", lambda: True)
    token = _forced.set(None)
    try:
        with torch.inference_mode():
            assert choose("linear", x, w, None) == "cpp"
            assert choose("linear", many, w.float(), None) == "cpp"
            assert choose("grouped_gemm", x, w[None], ends) == "cpp"
            assert choose("head_gemm", x[:, None], w[None]) == "cpp"
            assert choose("linear", many.bfloat16(), w, None) == "torch"
            assert choose("linear", x, w.float(), None) == "torch"
            assert choose("linear", x.double(), w.double(), None) == "torch"
            with torch.autocast("cpu", torch.bfloat16):
                assert choose("linear", x, w, None) == "torch"
        with torch.no_grad():
            assert choose("linear", x, w, None) == "torch", "it may be a pass that is computed again with a gradient"
        monkeypatch.setattr(products, "_measured", lambda: False)
        with torch.inference_mode():
            assert choose("linear", x, w, None) == "torch"
    finally:
        _forced.reset(token)


def test_under_autocast_they_fit_what_it_makes_of_the_operands():
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    assert choose("linear", x, w.bfloat16(), None) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose("linear", x, w.bfloat16(), None) == "cpp"
        assert choose("linear", x.double(), w.double(), None) == "torch"
        assert kernels.linear(x, w, torch.randn(3)).dtype == torch.bfloat16


def test_a_thousand_calls_keep_no_memory():
    x, w = torch.randn(40, 512).bfloat16(), torch.randn(512, 512).bfloat16()

    def calls(count):
        for _ in range(count):
            kernels.linear(x, w.mT)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = calls(50)
    assert calls(1000) - before < 1024  # KiB
