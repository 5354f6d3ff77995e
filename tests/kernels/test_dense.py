"""Norm, rotary embedding, gated activation and loss against their formulas, written in float64."""

import math

import pytest
import torch
from transformers.models.llama import modeling_llama as modeling

from turnout.kernels import cross_entropy, rms_norm, rope, swiglu

DTYPES = [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def close(value, truth, bound):
    torch.testing.assert_close(value.double(), truth, rtol=bound, atol=bound)


def turns(theta, d, dtype=torch.float32):
    return theta ** (-torch.arange(0, d, 2, dtype=torch.promote_types(dtype, torch.float32)) / d)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("T", [0, 1, 7])
def test_rms_norm_divides_by_the_root_mean_square(T, dtype, bound):
    x, weight = torch.randn(T, 9, dtype=dtype), torch.rand(9) + 0.5
    y = rms_norm(x, weight, 0.1)
    assert y.dtype == dtype
    rows = [[v / math.sqrt(sum(u * u for u in row) / 9 + 0.1) for v in row] for row in x.double().tolist()]
    close(y, torch.tensor(rows, dtype=torch.float64).view(T, 9) * weight.double(), bound)


def test_rms_norm_of_half_precision_is_computed_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square overflows float16
    assert torch.equal(rms_norm(x, torch.ones(4), 0.0), torch.ones(1, 4).half())


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("T", [0, 1, 6])
def test_rope_rotates_each_pair_by_its_angle(T, dtype, bound):
    x, positions = torch.randn(T, 2, 8, dtype=dtype), torch.randint(0, 500, (T,))
    y = rope(x, positions, turns(100.0, 8, dtype), 1.5)
    assert y.dtype == dtype
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angles = positions.double()[:, None] * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = pairs * torch.polar(torch.full_like(angles, 1.5), angles)[:, None]
    close(y, torch.cat((turned.real, turned.imag), dim=-1), max(bound, 1e-4) if dtype != torch.float64 else 1e-12)


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)
    turns_h = turns(1e4, 16, torch.float64)

    def score(at_q, at_k):
        return (rope(q, torch.tensor([at_q]), turns_h) * rope(k, torch.tensor([at_k]), turns_h)).sum()

    torch.testing.assert_close(score(7, 3), score(1007, 1003), rtol=1e-9, atol=1e-9)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rope_angles_stay_float32_under_autocast():
    x, positions = torch.randn(3, 2, 8), torch.tensor([1, 1001, 4097])
    with torch.autocast("cpu", torch.bfloat16):
        y = rope(x, positions, turns(1e4, 8))
    assert torch.equal(y, rope(x, positions, turns(1e4, 8)))


def test_rope_agrees_with_hugging_face():
    x, positions = torch.randn(5, 2, 8), torch.tensor([0, 1, 2, 50, 999])
    angles = positions.float()[:, None] * 1e4 ** (-torch.arange(0, 8, 2).float() / 8)
    angles = torch.cat((angles, angles), dim=-1)[None]
    theirs, _ = modeling.apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], angles.cos(), angles.sin()
    )
    torch.testing.assert_close(rope(x, positions, turns(1e4, 8)), theirs[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("N", [0, 1, 5])
def test_swiglu_gates_the_second_half_by_the_first(N, dtype, bound):
    x = torch.randn(N, 6, dtype=dtype)
    gate, up = x[:, :3].double(), x[:, 3:].double()
    y = swiglu(x)
    assert y.dtype == dtype
    close(y, gate / (1 + torch.exp(-gate)) * up, bound)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("T", [0, 1, 9])
def test_cross_entropy_is_nats_of_the_target(form, T, dtype, bound):
    logits, targets = torch.randn(T, 7, dtype=dtype), torch.randint(0, 7, (T,))
    loss = cross_entropy(logits, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = logits.double()
    truth = exact.exp().sum(1).log() - exact[torch.arange(T), targets]
    close(loss, truth, min(bound, 1e-5))


@pytest.mark.parametrize("target", [-1, -100, -7])
def test_negative_target_costs_nothing_and_teaches_nothing(form, target):
    logits = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([2, target, 4]))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss[1] == 0
    assert (grad[1] == 0).all()
    assert (loss[[0, 2]] > 0).all()
    torch.testing.assert_close(grad.sum(1), torch.zeros(3), atol=1e-6, rtol=0)


def test_cross_entropy_of_huge_logits_is_finite(form):
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert cross_entropy(logits, torch.tensor([0, 0])).tolist() == [0.0, 1e4]


def test_gradchecks(form):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    positions, targets = torch.tensor([0, 3, 9]), torch.tensor([1, -1, 3])
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rope(x[:, None], positions, turns(10.0, 4, torch.float64)), (x,))
    assert torch.autograd.gradcheck(swiglu, (x,))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (x,))
