"""AdamW's step: the reference in float64, the same bits in any piece of a tensor, gradients of any type."""

import pytest
import torch

from turnout import kernels
from turnout.kernels.cpp import build

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1}


def stepped(weight, grads, form=None, scale=1.0, **settings):
    weight, mean, square = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    with kernels.using(form):
        for step, grad in enumerate(grads, 1):
            kernels.adamw_step(weight, grad, mean, square, step=step, scale=scale, **{**SETTINGS, **settings})
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


@pytest.mark.parametrize("form", ["cpp", "reference"])
@pytest.mark.parametrize("steps", [1, 3000])
def test_moments_are_right_where_they_hardly_move(steps, form):
    torch.manual_seed(0)
    weight, grad, settings = torch.zeros(64), torch.randn(64), {"betas": (0.999, 0.9995)}
    _, mean, square = stepped(weight, [grad] * steps, form, **settings)
    _, mean_64, square_64 = stepped(weight.double(), [grad.double()] * steps, "reference", **settings)
    for ours, exact in ((mean, mean_64), (square, square_64)):
        assert float((ours.double() / exact - 1).mean().abs()) < 2e-6


@pytest.mark.parametrize("form", ["cpp", "reference"])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (7, 40_012), (16_384, 70_007), (69_990, 70_007)])
def test_a_piece_of_scaled_gradients_padded_or_not_has_the_bits_of_the_whole(first, last, form):
    torch.manual_seed(0)
    weight, grads = torch.randn(70_007), [torch.randn(70_007) for _ in range(3)]
    whole = stepped(weight.view(7, -1), [grad.view(7, -1) for grad in grads], form, scale=0.3)
    scaled = [torch.cat([grad[first:last].mul(0.3), torch.zeros(5)]) for grad in grads]
    pieces = stepped(torch.cat([weight[first:last], torch.zeros(5)]), scaled, form)
    assert not pieces[0][last - first :].any()
    for some, piece in zip(whole, pieces, strict=True):
        assert torch.equal(some.flatten()[first:last], piece[: last - first])


def test_a_narrow_gradient_steps_as_the_same_numbers_in_float32_and_stays():
    torch.manual_seed(0)
    weight, grad = torch.randn(999), torch.randn(999).bfloat16()
    before = grad.clone()
    assert all(map(torch.equal, stepped(weight, [grad], scale=0.7), stepped(weight, [grad.float()], scale=0.7)))
    assert torch.equal(grad, before)


@pytest.mark.full
@pytest.mark.parametrize("flags", [flags for _, flags in build.INSTRUCTIONS[1:]], ids=["avx512", "avx2", "none"])
def test_other_instructions_are_the_reference_too(flags, monkeypatch):
    if not {"avx512f", "avx2", "fma", "f16c"} <= build._cpu():
        return
    library = build.load(flags)
    monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda: library)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        test_it_is_the_reference_in_float64(1_003, dtype)
    test_moments_are_right_where_they_hardly_move(3000, "cpp")
    test_a_piece_of_scaled_gradients_padded_or_not_has_the_bits_of_the_whole(7, 40_012, "cpp")
