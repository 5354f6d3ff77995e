"""Sinkhorn against the definition in NumPy: the scales, the assignment, and what must not move them."""

import itertools

import numpy as np
import pytest
import torch

from turnout.moe import RouteContext
from turnout.moe.routing.sinkhorn import sinkhorn
from turnout.tests.moe.routing.by_hand import make, route

FREE = {"capacity_factor": None, "eval_capacity_factor": None}


def definition(logits):
    """(d1 · K · d0, d1, rounds made) in float64, as the table of formulas has it, with K = exp(h) as it is."""
    k = np.exp(np.asarray(logits, dtype=np.float64))
    n, m = k.shape
    d1, moved, made = np.ones(m), np.inf, 0
    while not moved < 1e-4 and made < 100:
        d0 = 1 / n * 1 / (k @ d1 + 1e-8)
        before, d1 = d1, 1 / m * 1 / (k.T @ d0 + 1e-8)
        moved, made = np.abs(d1 - before).mean(), made + 1
    return d1 * k * d0[:, None], d1, made


def numbers(tokens, experts, scale=1.0, seed=0):
    """Logits that favour the first experts, so that there is something to balance."""
    generator = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(tokens, experts, generator=generator) + torch.linspace(1, 0, experts))


def scales(logits, valid=None, cu=None):
    valid = torch.ones(len(logits), dtype=torch.bool) if valid is None else valid
    cu = [0, len(logits)] if cu is None else cu
    group = torch.repeat_interleave(torch.arange(len(cu) - 1), torch.tensor(cu).diff())
    return sinkhorn(logits, valid, group, len(cu) - 1)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "experts", "scale"), [(64, 8, 1.0), (50, 3, 0.1), (200, 4, 3.0), (7, 16, 5.0), (1, 2, 1)]
)
def test_assignment_is_the_definitions(tokens, experts, scale, top_k):
    logits = numbers(tokens, experts, scale)
    product, d1, _ = definition(logits)
    np.testing.assert_allclose(scales(logits)[0].numpy(), d1, rtol=1e-5)
    routing = route("sinkhorn", logits, top_k=top_k, **FREE)
    assert routing.ids_TK.tolist() == np.argsort(-product, axis=1, kind="stable")[:, :top_k].tolist()


def test_the_limit_of_rounds_is_the_definitions():
    logits = numbers(40, 4, scale=12.0, seed=3)
    product, d1, made = definition(logits)
    assert made == 100, "converged: take harder logits"
    assert route("sinkhorn", logits, **FREE).ids_TK[:, 0].tolist() == product.argmax(1).tolist()
    np.testing.assert_allclose(scales(logits)[0].numpy(), d1, rtol=1e-3)


def test_a_rows_own_scale_changes_nothing():
    """So dividing a row of K by its maximum is harmless, and exp can not overflow."""
    logits = (64 * numbers(60, 5)).round() / 64  # the sums below are exact
    up = torch.arange(60)[:, None] / 2
    plain, shifted = definition(logits), definition(logits + up)
    np.testing.assert_allclose(plain[0], shifted[0], rtol=1e-6)
    np.testing.assert_allclose(plain[1], shifted[1], rtol=1e-6)
    # far down the guard 1e-8 outweighs K, far up exp overflows: the definition breaks down, ours does not
    assert not np.allclose(definition(logits - 40)[1], plain[1], rtol=0.1)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(definition(logits + 800)[0]).any()
    chosen = route("sinkhorn", logits, **FREE).ids_TK
    for far in (up, -40, 800, 100 * up - 2000):
        torch.testing.assert_close(scales(logits + far), scales(logits), rtol=0, atol=0)
        assert torch.equal(route("sinkhorn", logits + far, **FREE).ids_TK, chosen)


def test_training_balances_what_evaluation_leaves_as_it_is():
    logits = numbers(400, 4, seed=2)
    trained, evaluated = route("sinkhorn", logits, **FREE), route("sinkhorn", logits, training=False, **FREE)
    assert torch.equal(evaluated.ids_TK[:, 0], logits.argmax(-1))
    even = 100
    assert (evaluated.counts_E - even).abs().max() > 50
    assert (trained.counts_E - even).abs().max() < 15


def test_weights_are_sigmoids_for_one_choice_and_probabilities_for_more():
    logits = numbers(30, 4)
    for training in (True, False):
        one = route("sinkhorn", logits, training=training, **FREE)
        assert torch.equal(one.weights_TK, logits.sigmoid().gather(1, one.ids_TK))
        two = route("sinkhorn", logits, training=training, top_k=2, **FREE)
        assert torch.equal(two.weights_TK, logits.softmax(-1).gather(1, two.ids_TK))
        torch.testing.assert_close(one.probs_TE, logits.softmax(-1))


def test_rows_are_balanced_apart_to_the_last_bit():
    logits, cu = numbers(70, 4, scale=4.0), [0, 30, 30, 31, 70]
    rounds = {definition(logits[a:b])[2] for a, b in itertools.pairwise(cu) if a < b}
    assert len(rounds) > 1, "the rows must converge in different rounds"
    together = scales(logits, cu=cu)
    for g, (start, end) in enumerate(itertools.pairwise(cu)):
        if start < end:
            assert torch.equal(scales(logits[start:end])[0], together[g])
    rows = route("sinkhorn", logits, RouteContext(cu_groups=torch.tensor(cu)), **FREE)
    assert torch.equal(rows.ids_TK[:30], route("sinkhorn", logits[:30], **FREE).ids_TK)
    whole = route("sinkhorn", logits, **FREE)
    assert not torch.equal(whole.ids_TK, rows.ids_TK)
    over_rank = route("sinkhorn", logits, RouteContext(cu_groups=torch.tensor(cu)), group="rank", **FREE)
    assert torch.equal(whole.ids_TK, over_rank.ids_TK)


def test_padding_takes_no_part():
    logits = numbers(40, 4)
    valid = torch.arange(40) % 3 != 1
    assert torch.equal(scales(logits, valid), scales(logits[valid]))
    routing = route("sinkhorn", logits, RouteContext(valid_T=valid), **FREE)
    assert torch.equal(routing.ids_TK[valid], route("sinkhorn", logits[valid], **FREE).ids_TK)
    assert torch.equal(routing.kept_TK[:, 0], valid)
    assert scales(logits, valid & False).isfinite().all()


def test_the_assignment_is_held_to_capacity():
    settings = {"capacity_factor": 1.0, "min_capacity": 0}
    alike = torch.tensor([[2.0, 1.0, 0.0]]).expand(6, 3)  # one row, six times: scaled, all experts tie
    routing = route("sinkhorn", alike, **settings)
    assert len(set(routing.ids_TK[:, 0].tolist())) == 1
    assert routing.kept_TK.sum() == 2
    retried = route("sinkhorn", alike, reroute=2, **settings)
    assert retried.kept_TK.all()
    assert sorted(retried.ids_TK[:, 0].tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_assignment_has_no_gradient_and_the_weights_do():
    logits = numbers(20, 4).requires_grad_()
    routing = make("sinkhorn", 4, **FREE)(logits, RouteContext())
    routing.weights_TK.sum().backward()
    expected = torch.zeros_like(logits)
    s = logits.detach().sigmoid().gather(1, routing.ids_TK)
    torch.testing.assert_close(logits.grad, expected.scatter(1, routing.ids_TK, s * (1 - s)))
