"""AdamW's step: the reference in float64, the same bits in any piece of a tensor, gradients of any type."""

import pytest
import torch

from turnout import kernels

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1}


def stepped(weight, grads, form=None, scale=1.0):
    weight, mean, square = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    with kernels.using(form):
        for step, grad in enumerate(grads, 1):
            kernels.adamw_step(weight, grad, mean, square, step=step, scale=scale, **SETTINGS)
    return weight, mean, square


@pytest.mark.parametrize("count", [0, 1, 15, 17, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_reference_in_float64(count, dtype):
    torch.manual_seed(0)
    weight, grads = torch.randn(count), [torch.randn(count).to(dtype) for _ in range(3)]
    found = stepped(weight, grads, scale=0.3)
    exact = stepped(weight.double(), [grad.double() for grad in grads], "reference", scale=0.3)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-6)


def test_a_piece_has_the_bits_of_the_whole():
    torch.manual_seed(0)
    weight, grads = torch.randn(70_001), [torch.randn(70_001) for _ in range(2)]
    whole = stepped(weight, grads)
    piece = stepped(weight[7:40_012].clone(), [grad[7:40_012].clone() for grad in grads])
    assert all(torch.equal(some[7:40_012], part) for some, part in zip(whole, piece, strict=True))


def test_a_narrow_gradient_steps_as_the_same_numbers_in_float32_and_stays():
    torch.manual_seed(0)
    weight, grad = torch.randn(999), torch.randn(999).bfloat16()
    before = grad.clone()
    assert all(map(torch.equal, stepped(weight, [grad], scale=0.7), stepped(weight, [grad.float()], scale=0.7)))
    assert torch.equal(grad, before)
