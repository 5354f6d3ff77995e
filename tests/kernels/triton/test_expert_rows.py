"""Rows that an exchange has sorted, through the layer of experts in Triton, against float64."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry

BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def check(counts, D, F, dtype):
    E, ends = len(counts), torch.tensor(counts).cumsum(0).int()
    shapes = ((sum(counts), D), (E, 2 * F, D), (E, F, D))
    leaves = [(torch.randn(shape) / shape[-1] ** 0.25).to(dtype).requires_grad_() for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with kernels.using("triton"):
        assert registry.choose("expert_rows", leaves[0], ends, *leaves[1:]) == "triton"
        out = kernels.expert_rows(leaves[0], ends, *leaves[1:])
    with kernels.using("reference"):
        truth = kernels.expert_rows(exact[0], ends, *exact[1:])
    grad = torch.randn(out.shape).to(dtype)
    found, wanted = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(truth, exact, grad.double())
    for one, other in zip((out, *found), (truth, *wanted), strict=True):
        assert one.shape == other.shape
        assert not one.isnan().any()
        assert (one.double() - other).norm() <= BOUND[dtype] * other.norm()


def test_rows_and_gradients_agree_with_float64():
    check([3, 0, 5, 1], 20, 12, torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("counts", "D", "F"), [([0, 0], 8, 8), ([0, 1], 3, 5), ([0, 40, 0, 1], 17, 65), ([7], 64, 64)])
def test_grid(counts, D, F, dtype):
    check(counts, D, F, dtype)
