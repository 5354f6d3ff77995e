"""The three objectives against plain loops, their gradients in closed form, and Jensen's inequality between two."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout import ConfigError
from turnout.moe.adaptive import OBJECTIVES, blend, competitive, cooperative, negative_log_likelihood, posterior

T, E, O = 7, 4, 3  # noqa: E741 the letters of the suffixes


def case(seed: int, tokens: int = T, experts: int = E, outputs: int = O):
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, experts, outputs), (tokens, experts), (tokens, outputs)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gates(logits: list[float]) -> list[float]:
    total = sum(math.exp(h) for h in logits)
    return [math.exp(h) / total for h in logits]


def distance(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def loop_cooperative(p, outputs, target):
    mixed = [sum(p_i * o_i[j] for p_i, o_i in zip(p, outputs, strict=True)) for j in range(len(target))]
    return distance(target, mixed)


def loop_competitive(p, outputs, target):
    return sum(p_i * distance(target, o_i) for p_i, o_i in zip(p, outputs, strict=True))


def loop_likelihood(p, outputs, target):
    return -math.log(sum(p_i * math.exp(-distance(target, o_i) / 2) for p_i, o_i in zip(p, outputs, strict=True)))


LOOPS = {"cooperative": loop_cooperative, "competitive": loop_competitive, "log-likelihood": loop_likelihood}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_an_objective_is_its_formula_case_by_case(name, seed):
    outputs, logits, targets = case(seed)
    rows = zip(outputs.tolist(), logits.tolist(), targets.tolist(), strict=True)
    want = sum(LOOPS[name](gates(h), o, d) for o, h, d in rows) / T
    assert OBJECTIVES[name](outputs, logits, targets).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_the_likelihood_are_those_of_the_paper(seed):
    outputs, logits, targets = case(seed)
    outputs.requires_grad_()
    logits.requires_grad_()
    negative_log_likelihood(outputs, logits, targets).backward()
    post = posterior(outputs, logits, targets).detach()
    want = -post[..., None] * (targets[:, None] - outputs.detach())
    torch.testing.assert_close(outputs.grad * T, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logits.grad * T, logits.detach().softmax(-1) - post, rtol=1e-12, atol=1e-13)


def test_the_competitive_gradient_weighs_by_the_gate_and_not_by_the_posterior():
    outputs, logits, targets = case(0)
    outputs.requires_grad_()
    competitive(outputs, logits, targets).backward()
    want = -2 * logits.softmax(-1)[..., None] * (targets[:, None] - outputs.detach())
    torch.testing.assert_close(outputs.grad * T, want, rtol=1e-12, atol=1e-13)


def test_the_cooperative_gradient_sends_one_residue_to_every_expert():
    outputs, logits, targets = case(0)
    outputs.requires_grad_()
    cooperative(outputs, logits, targets).backward()
    residue = targets - blend(outputs.detach(), logits)
    want = -2 * logits.softmax(-1)[..., None] * residue[:, None]
    torch.testing.assert_close(outputs.grad * T, want, rtol=1e-12, atol=1e-13)


def test_the_posterior_is_bayes_rule():
    outputs, logits, targets = case(1)
    joint = logits.softmax(-1) * (-(targets[:, None] - outputs).square().sum(-1) / 2).exp()
    torch.testing.assert_close(posterior(outputs, logits, targets), joint / joint.sum(-1, keepdim=True))


few = st.integers(2, 5)
reals = st.floats(-3, 3)


@st.composite
def one_case(draw):
    experts, size = draw(few), draw(few)
    outputs, logits, target = ([draw(reals) for _ in range(n)] for n in (experts * size, experts, size))
    outputs, logits, target = (torch.tensor(v, dtype=torch.float64) for v in (outputs, logits, target))
    return outputs.view(1, experts, size), logits[None], target[None]


@settings(deadline=None)
@given(one_case())
def test_the_likelihood_is_at_most_half_the_competitive_objective(drawn):
    outputs, logits, targets = drawn
    half = competitive(outputs, logits, targets).item() / 2
    loss = negative_log_likelihood(outputs, logits, targets).item()
    assert loss <= half + 1e-12
    distances = (targets[:, None] - outputs).square().sum(-1)
    if distances.max() - distances.min() >= 1:  # then the inequality is strict: every p_i is at least e^-6 / 5
        assert loss < half - 1e-6


@settings(deadline=None)
@given(one_case(), st.floats(0, 5))
def test_both_are_equal_where_all_distances_are(drawn, radius):
    outputs, logits, targets = drawn
    outputs = outputs + torch.tensor(4.0, dtype=torch.float64)  # no expert's direction is zero
    outputs = targets[:, None] + radius * outputs / outputs.norm(dim=-1, keepdim=True)
    half = competitive(outputs, logits, targets).item() / 2
    assert negative_log_likelihood(outputs, logits, targets).item() == pytest.approx(half, rel=1e-9, abs=1e-12)
    assert half == pytest.approx(radius**2 / 2, rel=1e-9, abs=1e-12)


def test_one_expert_knows_one_objective():
    outputs, logits, targets = case(2, experts=1)
    want = (targets - outputs[:, 0]).square().sum(-1).mean()
    torch.testing.assert_close(cooperative(outputs, logits, targets), want)
    torch.testing.assert_close(competitive(outputs, logits, targets), want)
    torch.testing.assert_close(negative_log_likelihood(outputs, logits, targets), want / 2)
    assert torch.equal(posterior(outputs, logits, targets), torch.ones(T, 1, dtype=torch.float64))


def test_equal_experts_make_cooperation_and_competition_the_same():
    outputs, logits, targets = case(3)
    outputs = outputs[:, :1].expand(T, E, O)
    torch.testing.assert_close(cooperative(outputs, logits, targets), competitive(outputs, logits, targets))


@pytest.mark.parametrize("far", [1e2, 1e4, 1e8])
def test_targets_far_from_every_expert_do_not_overflow(far):
    outputs, logits, targets = (part.float() for part in case(4))
    outputs = (outputs + far).requires_grad_()
    logits = logits.requires_grad_()
    loss = negative_log_likelihood(outputs, logits, targets)
    loss.backward()
    assert loss.item() == pytest.approx(O * far**2 / 2, rel=0.1)
    assert outputs.grad.isfinite().all()
    assert logits.grad.isfinite().all()
    post = posterior(outputs, logits, targets)
    torch.testing.assert_close(post.sum(-1), torch.ones(T))


def test_extreme_gates_do_not_overflow():
    outputs, logits, targets = (part.float() for part in case(5))
    loss = negative_log_likelihood(outputs, (1e6 * logits).requires_grad_(), targets)
    assert loss.isfinite()
    assert posterior(outputs, 1e6 * logits, targets).isfinite().all()


@pytest.mark.parametrize("function", [*OBJECTIVES.values(), posterior])
@pytest.mark.parametrize("wrong", [(1, O), (T, 1), (T, E, O)])
def test_a_target_that_would_broadcast_is_refused(function, wrong):
    outputs, logits, _ = case(6)
    with pytest.raises(ConfigError, match="outputs, logits, targets"):
        function(outputs, logits, torch.zeros(wrong, dtype=torch.float64))
