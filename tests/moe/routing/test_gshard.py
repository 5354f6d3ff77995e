"""GShard's second expert: when it is wanted, which one it is, and what the pair weighs."""

import pytest
import torch

from turnout.kernels import uniform
from turnout.kernels.random import ROUTE_SECOND
from turnout.moe import RouteContext
from turnout.tests.moe.routing.by_hand import kept, make, route

FREE = {"capacity_factor": None, "eval_capacity_factor": None}
# g2' = 0.5, 0.4, 0.25, 0.2, 0.1 of the two best, beside a third expert
SECOND = [0.5, 0.4, 0.25, 0.2, 0.1]
PAIRS = torch.tensor([[1 - g, g, 0.001] for g in SECOND]).log()


def second_wanted(**settings):
    return route("gshard", PAIRS, **FREE, **settings).wanted_TK[:, 1].tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.2, 1.0])
def test_random_wants_the_second_with_its_gate_over_the_threshold(threshold):
    index = torch.arange(1000, 1005)
    for step in range(20):
        context = RouteContext(index_T=index, seed=11, step=step)
        routing = route("gshard", PAIRS, context, layer=2, second_threshold=threshold, **FREE)
        draws = uniform(11, index, step=step, layer=2, purpose=ROUTE_SECOND)[:, 0]
        assert routing.wanted_TK[:, 0].all()
        expected = (torch.tensor(SECOND) / threshold).clamp(max=1) > draws
        assert torch.equal(routing.wanted_TK[:, 1], expected)
        assert torch.equal(routing.kept_TK, routing.wanted_TK)
        assert int(routing.counts_E.sum()) == 5 + int(expected.sum())


def test_random_wants_it_as_often_as_it_says():
    tokens = 20_000
    for threshold, share in ((0.5, 0.5), (0.2, 1.0), (1.0, 0.25)):
        logits = PAIRS[2].expand(tokens, 3)  # g2' = 0.25
        wanted = route("gshard", logits, second_threshold=threshold, **FREE).wanted_TK[:, 1].float().mean()
        assert abs(wanted - share) <= 4 * (share * (1 - share) / tokens) ** 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"second_policy": "all"}, [True] * 5),
        ({"second_policy": "none"}, [False] * 5),
        ({"second_policy": "gumbel"}, [True] * 5),
        ({"second_policy": "threshold", "second_threshold": 0.3}, [True, True, False, False, False]),
        ({"second_policy": "threshold"}, [False] * 5),  # no second gate is above one half
    ],
)
def test_policies_without_chance_want_the_same_in_training_and_evaluation(settings, wanted, training):
    assert second_wanted(training=training, **settings) == wanted


def test_random_always_wants_the_second_in_evaluation():
    assert second_wanted(training=False) == [True] * 5


def test_a_second_that_is_not_wanted_takes_no_slot():
    logits = PAIRS[[4, 4, 4]][:, [1, 0, 2]].repeat(2, 1)  # first expert 1, second expert 0
    logits[3:] = PAIRS[4]  # the other way round
    settings = {"capacity_factor": 0.75, "min_capacity": 0}  # three slots
    assert kept(route("gshard", logits, second_policy="none", **settings)) == [[1, 0]] * 6
    assert kept(route("gshard", logits, second_policy="all", **settings)) == [[1, 1]] * 3 + [[0, 0]] * 3


def test_gumbel_draws_the_second_among_the_others_by_probability():
    tokens, logits = 20_000, torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    routing = route("gshard", logits.expand(tokens, 4), RouteContext(seed=1), second_policy="gumbel", **FREE)
    first, second = routing.ids_TK.T
    assert first.eq(1).all()
    share = torch.tensor([0.2, 0.0, 0.5, 0.3])
    found = torch.bincount(second, minlength=4) / tokens
    assert ((found - share).abs() <= 4 * (share * (1 - share) / tokens).sqrt()).all()
    gates = logits.softmax(-1)[routing.ids_TK]  # the weights know nothing of the noise
    torch.testing.assert_close(routing.weights_TK, gates / gates.sum(-1, keepdim=True))


def test_gumbel_is_keyed_and_acts_in_training_only():
    logits, index = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(200, 1), torch.arange(200) + 17
    module = make("gshard", 3, second_policy="gumbel", **FREE)
    drawn = module(logits, RouteContext(index_T=index, seed=2)).ids_TK
    assert torch.equal(module(logits[50:60], RouteContext(index_T=index[50:60], seed=2)).ids_TK, drawn[50:60])
    for other in ({"seed": 3}, {"seed": 2, "step": 1}):
        assert not torch.equal(module(logits, RouteContext(index_T=index, **other)).ids_TK, drawn)
    assert module.eval()(logits, RouteContext()).ids_TK.tolist() == [[0, 1]] * 200


def test_kept_weights_are_renormalised_after_dropping_on_request():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.4, 0.1, 0.5], [0.6, 0.3, 0.1]]).log()
    settings = {"second_policy": "all", "capacity_factor": 0.75, "min_capacity": 0}  # two slots
    before = route("gshard", logits, **settings)
    assert before.ids_TK.tolist() == [[0, 1], [1, 0], [2, 0], [0, 1]]
    assert kept(before) == [[1, 1], [1, 1], [1, 0], [0, 0]]
    torch.testing.assert_close(before.weights_TK, torch.tensor([[6.0, 3.0], [6, 3], [5, 4], [6, 3]]) / 9)
    after = route("gshard", logits, renormalize_kept=True, **settings)
    assert kept(after) == kept(before)
    torch.testing.assert_close(after.weights_TK, torch.tensor([[6.0, 3.0], [6, 3], [9, 0], [0, 0]]) / 9)


def test_a_second_that_is_not_wanted_leaves_the_first_all_weight_when_renormalised():
    routing = route("gshard", PAIRS, second_policy="none", renormalize_kept=True, **FREE)
    assert routing.weights_TK.tolist() == [[1.0, 0.0]] * 5
    before = route("gshard", PAIRS, second_policy="none", **FREE)
    torch.testing.assert_close(before.weights_TK[:, 0], 1 - torch.tensor(SECOND))


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_and_gradients_are_finite_where_probabilities_underflow(renormalize):
    """Both best experts are full, and the pair that is left has probability 0."""
    logits = torch.tensor([[300.0, 200.0, -100.0, -101.0]] * 3, requires_grad=True)
    settings = {"second_policy": "all", "capacity_factor": 0.5, "min_capacity": 0, "reroute": 1}
    routing = make("gshard", 4, renormalize_kept=renormalize, **settings)(logits, RouteContext())
    assert routing.ids_TK.tolist() == [[0, 1], [2, 3], [0, 1]]
    assert kept(routing) == [[1, 1], [1, 1], [0, 0]]
    torch.testing.assert_close(routing.weights_TK[1], torch.tensor([1.0, 0.0]).softmax(-1))
    assert (routing.weights_TK[2].tolist() == [0, 0]) == renormalize
    routing.weights_TK[:, 0].sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 2] > 0
