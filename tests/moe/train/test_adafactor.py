"""Adafactor: the update by hand, torch's where both mean the same, experts that never hear of another."""

import pytest
import torch
from torch import nn

from turnout.moe.train.adafactor import Adafactor

# r = (5/2, 25/2), c = (5, 10), mean(r) = 15/2, so v = [[5/3, 10/3], [25/3, 50/3]] and mean(g² / v) = 0.96
GRAD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
DIRECTION = GRAD / torch.tensor([[5 / 3, 10 / 3], [25 / 3, 50 / 3]]).sqrt()


def move(kind, start, grads, **settings):
    """A parameter after a step on each gradient, and its optimizer."""
    weight = nn.Parameter(start.clone())
    optimizer = kind([weight], **settings)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach(), optimizer


def test_the_first_step_of_a_matrix_is_the_paper_s():
    weight, optimizer = move(Adafactor, torch.ones(2, 2), [GRAD], lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(weight, 0.95 - 0.1 * DIRECTION)
    (kept,) = optimizer.state.values()
    assert (kept["row_square"].tolist(), kept["column_square"].tolist()) == ([2.5, 12.5], [5.0, 10.0])


def test_the_second_step_decays_the_squares_by_its_number_and_is_clipped():
    weight, _ = move(Adafactor, torch.zeros(2, 2), [GRAD, 10 * GRAD], lr=0.1)
    share = 2**-0.8
    assert 100 * 0.96 / (1 - share + 100 * share) > 1
    torch.testing.assert_close(weight, -0.1 * (DIRECTION + DIRECTION / 0.96**0.5))
    calm, _ = move(Adafactor, torch.zeros(2, 2), [GRAD, 0.5 * GRAD], lr=0.1)
    torch.testing.assert_close(calm, -0.1 * (DIRECTION + 0.5 * DIRECTION / (1 - share + 0.25 * share) ** 0.5))


def test_a_vector_keeps_all_its_squares():
    grad = torch.tensor([1.0, -2.0, 4.0])
    weight, optimizer = move(Adafactor, torch.zeros(3), [grad], lr=0.1)
    torch.testing.assert_close(weight, -0.1 * grad.sign())
    (kept,) = optimizer.state.values()
    torch.testing.assert_close(kept["square"], grad.square())


@pytest.mark.parametrize("shape", [(7,), (6, 10), (10, 6), (1, 9)], ids=str)
def test_it_is_torch_s_where_both_mean_the_same(shape):
    """torch's rate is max(eps2, rms(w)) · min(lr, 1 / √t): with eps2 = 1 above rms(w) and a small lr it is lr."""
    torch.manual_seed(0)
    start = 0.1 * torch.randn(shape)
    grads = [torch.randn(shape) * 3 ** (i % 3) for i in range(10)]
    ours, _ = move(Adafactor, start, grads, lr=0.01, weight_decay=0.1)
    theirs, _ = move(torch.optim.Adafactor, start, grads, lr=0.01, weight_decay=0.1, eps=(1e-15, 1.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_torch_clips_a_stack_as_one_and_an_expert_here_never_hears_of_another():
    """One of two experts gets a tenfold gradient: with torch it moves 1.13 of its clip, the calm one 0.87 of a step."""
    zero, calm, loud = torch.zeros(2, 2, 2), torch.stack([GRAD, GRAD]), torch.stack([GRAD, 10 * GRAD])
    settings = {"lr": 0.01}
    after_one, _ = move(Adafactor, zero, [calm], **settings)
    ours, _ = move(Adafactor, zero, [calm, loud], **settings)
    theirs, _ = move(torch.optim.Adafactor, zero, [calm, loud], eps=(1e-15, 1.0), **settings)
    ratio = ((theirs - after_one) / (ours - after_one)).mean((1, 2))
    assert ratio.tolist() == pytest.approx([0.87, 1.13], abs=0.005)
    for expert in range(2):
        alone, _ = move(Adafactor, zero[expert], [calm[expert], loud[expert]], **settings)
        assert torch.equal(ours[expert], alone)


def test_slices_of_a_stack_move_as_the_stack_does_to_the_bit():
    torch.manual_seed(0)
    start, grads = torch.randn(4, 16, 24), [torch.randn(4, 16, 24) for _ in range(5)]
    whole, _ = move(Adafactor, start, grads, lr=0.01, weight_decay=0.1)
    for part in (slice(0, 2), slice(2, 4)):
        sliced, _ = move(Adafactor, start[part], [grad[part] for grad in grads], lr=0.01, weight_decay=0.1)
        assert torch.equal(whole[part], sliced)


def test_a_state_costs_a_row_and_a_column_and_is_float32():
    weight = nn.Parameter(torch.randn(3, 16, 8).bfloat16())
    idle, silent = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))
    weight.grad, silent.grad = torch.randn(3, 16, 8).bfloat16(), torch.zeros(4, 8)
    optimizer = Adafactor([weight, idle, silent], lr=0.1)
    optimizer.step()
    kept = {key: value for key, value in optimizer.state[weight].items() if key != "step"}
    assert {key: tuple(value.shape) for key, value in kept.items()} == {"row_square": (3, 16), "column_square": (3, 8)}
    assert {value.dtype for value in kept.values()} == {torch.float32}
    assert torch.equal(idle, torch.ones(4, 8))
    assert torch.equal(silent, torch.ones(4, 8))


def test_it_solves_least_squares():
    torch.manual_seed(0)
    x_ND, truth_EDF = torch.randn(64, 8), torch.randn(2, 8, 4)
    weight_EDF = nn.Parameter(torch.zeros(2, 8, 4))
    optimizer, losses = Adafactor([weight_EDF], lr=0.1), []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        loss = (x_ND @ weight_EDF - x_ND @ truth_EDF).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-4 * losses[0]
