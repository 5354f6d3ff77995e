"""Products with weights of eight and four bits in Triton against the written-out ones."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import quantize_weight, registry

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def both(op, *args):
    with kernels.using("triton"):
        assert registry.choose(op, *args) == "triton"
        found = getattr(kernels, op)(*args)
    with kernels.using("reference"):
        return found, getattr(kernels, op)(*args)


def assert_near(found, wanted, dtype):
    assert found.dtype == wanted.dtype == dtype
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).norm() <= BOUND[dtype] * wanted.double().norm()


KINDS = (
    {}, {"zero": True}, {"group": 64}, {"group": 128, "zero": True}, {"bits": 4},
    {"bits": 4, "group": 128, "zero": True},
    {"kind": "float"}, {"rows": "int8", "group": 64, "zero": True}, {"rows": "int8", "bits": 4, "zero": True},
)  # fmt: skip


def check_linear(T, F, D, bits, dtype, bias=True, rows="int8", **how):
    w = quantize_weight(torch.randn(F, D) + 0.3, bits, rows=rows, **how)
    assert_near(*both("quantized_linear", torch.randn(T, D).to(dtype), w, torch.randn(F) if bias else None), dtype)


def check_mixture(T, E, K, bits, dtype, D=64, F=64, dropping=True, rows="int8", **how):
    w_in, w_out = (quantize_weight(torch.randn(E, *shape), bits, rows=rows, **how) for shape in ((2 * F, D), (D, F)))
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.empty(0, K, dtype=torch.int64)
    kept = torch.rand(T, K) < 0.7 if dropping else None
    args = (torch.randn(T, D).to(dtype), ids, torch.rand(T, K), kept, w_in, w_out)
    assert_near(*both("quantized_moe_mlp", *args), dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_those_of_rounded_rows(bits):
    check_linear(3, 20, 128, bits, torch.float32)
    check_mixture(5, 4, 2, bits, torch.bfloat16)


@pytest.mark.parametrize("how", KINDS)
def test_every_kind_of_weight_meets_rows_as_they_are(how):
    how = {"bits": 8, "rows": "float"} | how
    check_linear(3, 20, 128, dtype=torch.float32, **how)
    check_linear(5, 7, 128, dtype=torch.bfloat16, **how)


@pytest.mark.parametrize("how", [{"bits": 8}, {"bits": 4, "zero": True}])
def test_a_mixture_takes_rows_as_they_are(how):
    check_mixture(5, 4, 2, dtype=torch.bfloat16, rows="float", **how)


def test_a_row_that_is_not_finite_is_nan_and_spoils_no_other():
    x = torch.randn(4, 64).bfloat16()
    x[1, 3], x[2], x[3, 0] = torch.inf, 0.0, torch.nan
    found, wanted = both("quantized_linear", x, quantize_weight(torch.randn(7, 64), rows="int8"), None)
    assert found.isnan().tolist() == wanted.isnan().tolist() == [[False] * 7, [True] * 7, [False] * 7, [True] * 7]
    assert not found[2].any()


def test_a_row_too_small_for_a_turn_is_zero_and_a_strided_bias_is_read_where_it_lies():
    x, bias = torch.zeros(2, 64), torch.randn(7, 2)[:, 1]
    x[0, :5] = -3e-38
    found, wanted = both("quantized_linear", x, quantize_weight(torch.randn(7, 64), rows="int8"), bias)
    assert torch.equal(found, wanted)
    assert torch.equal(found, bias.expand(2, 7))


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("bits", "T", "F", "D"),
    [(8, 0, 5, 8), (8, 1, 1, 1), (8, 7, 37, 65), (8, 40, 130, 200), (4, 1, 16, 64), (4, 9, 37, 192), (4, 35, 129, 128)],
)
def test_grid(bits, T, F, D, dtype):
    check_linear(T, F, D, bits, dtype, bias=T % 2 == 0)


@pytest.mark.full
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 4, 4), (9, 3, 1), (70, 2, 2)])
def test_grid_of_mixtures(T, E, K, bits):
    check_mixture(T, E, K, bits, (torch.float32, torch.bfloat16)[T % 2], dropping=T % 3 > 0)
