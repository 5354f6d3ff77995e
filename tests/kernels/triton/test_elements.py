"""Norm, rotation, SwiGLU and loss in Triton against their references in float64, with gradients."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry

BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def norm(T, D):
    return "rms_norm", (torch.randn(T, D) * 3, torch.randn(D), 1e-5)


def head_norm(T, D):
    return "rms_norm", (torch.randn(T, 3, D), torch.randn(D), 1e-5)


def turn(T, D):
    return "rope", (torch.randn(T, 3, 2 * D), torch.randint(0, 10**4, (T,)), torch.rand(D), 1.3)


def known_turn(T, D):
    angles = torch.rand(D, T) * 100
    return "rotate", (torch.randn(T, 3, 2 * D), angles.cos().mT, angles.sin().mT)


def gate(T, D):
    return "swiglu", (torch.randn(T, 2 * D) * 3,)


def loss(T, D):
    targets = torch.randint(0, D, (T,))
    targets[::3] = -100
    return "cross_entropy", (torch.randn(T, D) * 5, targets)


def check(case, dtype):
    """Only the rows are of half precision: weights, angles and losses stay float32."""
    op, args = case
    x = args[0].to(dtype).requires_grad_()
    own = [x, *(t.requires_grad_() if op == "rms_norm" and isinstance(t, torch.Tensor) else t for t in args[1:])]
    wide = [t.detach().double().requires_grad_(t.requires_grad) if _floating(t) else t for t in own]
    if op == "rope":  # the angles are float32 in either
        wide[2] = own[2].detach()
    with kernels.using("triton"):
        assert registry.choose(op, *own) == "triton"
        out = getattr(kernels, op)(*own)
    with kernels.using("reference"):
        truth = getattr(kernels, op)(*wide)
    assert out.dtype == (torch.float32 if op == "cross_entropy" else dtype)
    grad = torch.randn(out.shape).to(out.dtype)
    leaves, leaves64 = ([t for t in some if _floating(t) and t.requires_grad] for some in (own, wide))
    got = (out, *torch.autograd.grad(out, leaves, grad))
    for value, exact in zip(got, (truth, *torch.autograd.grad(truth, leaves64, grad.double())), strict=True):
        assert value.shape == exact.shape
        assert not value.isnan().any()
        assert (value.double() - exact).norm() <= BOUND[dtype] * exact.norm()


def _floating(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


@pytest.mark.parametrize("make", [norm, turn, known_turn, gate, loss])
def test_results_and_gradients_agree_with_float64(make):
    check(make(35, 20), torch.bfloat16)


def test_a_row_of_the_norm_has_the_same_bits_alone_and_in_any_batch():
    x, weight = torch.randn(9, 70).bfloat16(), torch.randn(70)
    with kernels.using("triton"):
        together = kernels.rms_norm(x, weight, 1e-5)
        assert torch.equal(kernels.rms_norm(x[4:5], weight, 1e-5), together[4:5])


def test_logits_that_are_excluded_have_no_share():
    logits = torch.tensor([[-torch.inf, 1.0, 2.0], [-torch.inf, -torch.inf, 3.0]], requires_grad=True)
    with kernels.using("triton"):
        losses = kernels.cross_entropy(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(losses.detach(), torch.tensor([1.3132617, 0.0]))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert (grad[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("count", [0, 1, 1025, 150_000])
def test_squares_are_added_in_float64(count, dtype):
    x = torch.randn(count).to(dtype)
    with kernels.using("triton"):
        assert registry.choose("square_sum", x) == "triton"
        found = kernels.square_sum(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x.double().square().sum(), rtol=1e-13, atol=0)


def check_sum(T, D, dtype):
    """A sum that is rounded, its norm, and gradients through both."""
    x, y = (torch.randn(T, D).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(D, requires_grad=True)
    args = (x, y, weight, 1e-5)
    with kernels.using("triton"):
        assert registry.choose("add_rms_norm", *args) == "triton"
        total, out = kernels.add_rms_norm(*args)
    assert torch.equal(total, x + y)
    rounded = total.detach().double().requires_grad_()
    with kernels.using("reference"):
        truth = kernels.rms_norm(rounded, weight.detach().double().requires_grad_(), 1e-5)
    grads = torch.randn(2, T, D).to(dtype)
    (through,) = torch.autograd.grad(truth, rounded, grads[1].double())
    exact = through + grads[0].double()
    got = torch.autograd.grad((total, out), (x, y), (grads[0], grads[1]))
    for value, wanted in ((out, truth), (got[0], exact), (got[1], exact)):
        assert (value.double() - wanted).norm() <= BOUND[dtype] * wanted.norm()


def test_a_sum_and_its_norm_agree_with_float64():
    check_sum(5, 20, torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("T", "D"), [(0, 8), (1, 1), (33, 17)])
def test_sum_grid(T, D, dtype):
    check_sum(T, D, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("T", "D"), [(0, 8), (1, 3), (3, 17), (33, 16), (65, 1025)])
@pytest.mark.parametrize("make", [norm, head_norm, turn, known_turn, gate, loss])
def test_grid(make, T, D, dtype):
    check(make(T, D), dtype)


@pytest.mark.full
def test_long_rows_of_logits_take_several_steps():
    check(loss(3, 10_000), torch.float32)
