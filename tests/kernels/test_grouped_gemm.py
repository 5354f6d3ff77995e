"""Grouped GEMM against one float64 product a row."""

import pytest
import torch

from turnout.kernels import grouped_gemm

# rows, depth, width, ends
SHAPES = {
    "no rows": (0, 8, 16, [0, 0, 0]),
    "one row": (1, 8, 16, [0, 1, 1]),
    "odd sizes": (37, 13, 7, [5, 5, 30, 37]),
    "aligned": (50, 32, 64, [20, 31, 40, 50]),
    "one hot expert": (40, 16, 8, [0, 40, 40, 40]),
    "an expert a row": (12, 8, 8, list(range(1, 13))),
    "one expert": (9, 8, 24, [9]),
}
LAYOUTS = {
    "contiguous": lambda E, K, M: torch.randn(E, K, M),
    "transposed": lambda E, K, M: torch.randn(E, M, K).mT,
    "strided": lambda E, K, M: torch.randn(E, K, 2 * M)[..., ::2],
    "padded rows": lambda E, K, M: torch.randn(E, K, M + 3)[..., :M],
}


def make(shape, layout="contiguous", dtype=torch.float32):
    N, K, M, ends = shape
    w = LAYOUTS[layout](len(ends), K, M)
    # .to keeps the strides of a dense tensor only
    w = w if w.dtype == dtype else w.to(dtype)
    return torch.randn(N, K, dtype=dtype), w, torch.tensor(ends, dtype=torch.int32)


def row_by_row(x, w, ends):
    owner = torch.searchsorted(ends, torch.arange(x.shape[0]), right=True)
    return torch.einsum("nk,nkm->nm", x.double(), w.double()[owner])


def relative_error(value, truth):
    return (value.double() - truth).norm() / truth.norm().clamp_min(1e-300)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_row_is_multiplied_by_its_experts_matrix(form, shape, layout):
    x, w, ends = make(shape, layout)
    y = grouped_gemm(x, w, ends)
    assert y.shape == (shape[0], shape[2])
    assert relative_error(y, row_by_row(x, w, ends)) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float64, 1e-15)])
def test_other_dtypes_round_once(form, dtype, bound):
    x, w, ends = make(SHAPES["aligned"], dtype=dtype)
    y = grouped_gemm(x, w, ends)
    assert y.dtype == dtype
    assert relative_error(y, row_by_row(x, w, ends)) < bound


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_float64_products(form, shape, layout):
    x, w, ends = make(shape, layout)
    grad = torch.randn(shape[0], shape[2])
    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    truths = torch.autograd.grad(row_by_row(x64, w64, ends), (x64, w64), grad.double())
    x, w = x.requires_grad_(), w.requires_grad_()
    for value, truth in zip(torch.autograd.grad(grouped_gemm(x, w, ends), (x, w), grad), truths, strict=True):
        assert relative_error(value, truth) < 1e-6


def test_gradcheck(form):
    x, w, ends = make((6, 3, 2, [2, 2, 6]), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, ends), (x.requires_grad_(), w.requires_grad_()))


def test_experts_without_rows_have_zero_gradient(form):
    x, w, ends = make(SHAPES["one hot expert"])
    (grad,) = torch.autograd.grad(grouped_gemm(x, w.requires_grad_(), ends).sum(), w)
    assert grad[[0, 2, 3]].abs().max() == 0
    assert grad[1].abs().min() > 0


def test_autocast_casts_both_operands(form):
    x, w, ends = make(SHAPES["aligned"])
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_gemm(x, w.requires_grad_(), ends)
        assert grouped_gemm(x.double(), w.double(), ends).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grouped_gemm(x.bfloat16(), w.bfloat16(), ends))
    grads = torch.autograd.grad(y.float().sum(), (x, w))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.full
@pytest.mark.parametrize("experts", [1, 3, 8, 60, 512])
@pytest.mark.parametrize("depth", [1, 8, 63, 95, 128])
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 256])
def test_shape_grid(form, rows, depth, experts):
    ends = torch.randint(0, rows + 1, (experts,)).sort()[0]
    ends[-1] = rows
    x, w, ends = make((rows, depth, 24, ends.tolist()))
    assert relative_error(grouped_gemm(x, w, ends), row_by_row(x, w, ends)) < 1e-6
