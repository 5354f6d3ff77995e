"""Expert choice by hand: which tokens each expert takes, from which group, and with which weight."""

import pytest
import torch

from turnout.moe import RouteContext
from turnout.moe.routing.expert_choice import ExpertChoiceRouter
from turnout.tests.moe.routing.by_hand import kept, route

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.1, 0.1, 0.8], [0.2, 0.4, 0.4]])
LOGITS = PROBS.log()


def choose(logits=LOGITS, context=None, *, factor=1.0, **settings):
    factors = {"capacity_factor": factor, "eval_capacity_factor": factor}
    return route("expert_choice", logits, context, **factors, **{"top_k": 1, "min_capacity": 0} | settings)


def test_each_expert_takes_its_highest_scores_and_weighs_by_them():
    routing = choose(factor=1.5)  # ceil(1.5 * 4 / 3) = 2 tokens each
    assert routing.ids_TK.tolist() == [[0, 1, 2]] * 4
    assert kept(routing) == [[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1]]
    assert torch.equal(routing.wanted_TK, routing.kept_TK)
    torch.testing.assert_close(routing.weights_TK, PROBS)
    assert routing.counts_E.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("top_k", "factor", "slots"), [(1, 1.0, 2), (2, 1.0, 3), (1, 0.5, 1), (3, 1.0, 4), (2, 9.0, 4)]
)
def test_an_expert_takes_the_mean_times_the_factor(top_k, factor, slots):
    routing = choose(top_k=top_k, factor=factor)
    assert routing.counts_E.tolist() == [slots] * 3
    assert choose(top_k=1, factor=0.5, min_capacity=3).counts_E.tolist() == [3] * 3


def test_ties_go_to_the_earlier_token():
    assert kept(choose(torch.zeros(5, 3), factor=1.2)) == [[1, 1, 1]] * 2 + [[0, 0, 0]] * 3
    tied = LOGITS[[3, 0, 0, 0]]
    assert kept(choose(tied, factor=1.5)) == [[0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_scores_that_underflow_are_still_told_apart():
    logits = torch.tensor([[0.0, 300.0], [0.0, 200.0], [0.0, 400.0]])
    routing = choose(logits, factor=0.5)
    assert routing.probs_TE[:, 0].tolist() == [0.0] * 3
    assert kept(routing) == [[0, 1], [1, 0], [0, 0]]  # all probabilities of expert 1 round to 1: the earliest


def test_rows_choose_apart_and_padding_is_not_chosen():
    rows = RouteContext(
        cu_groups=torch.tensor([0, 2, 2, 6]), valid_T=torch.tensor([True, True, True, False, True, True])
    )
    logits = LOGITS[[0, 1, 0, 2, 3, 1]]
    routing = choose(logits, rows)
    first, second = choose(LOGITS[[0, 1]]), choose(LOGITS[[0, 3, 1]])
    assert kept(routing) == [*kept(first), kept(second)[0], [0, 0, 0], *kept(second)[1:]]
    assert routing.counts_E.tolist() == [2, 2, 2]  # one of each row
    assert kept(choose(logits, rows, group="rank")) == kept(choose(logits, RouteContext(valid_T=rows.valid_T)))


def test_fewer_valid_tokens_than_slots_are_all_taken():
    valid = torch.tensor([False, True, False, False])
    context = RouteContext(valid_T=valid)
    assert kept(choose(context=context, min_capacity=4)) == [[0] * 3, [1] * 3, [0] * 3, [0] * 3]
    assert choose(context=RouteContext(valid_T=valid & False)).counts_E.sum() == 0


def test_evaluation_has_its_own_factor_and_row_length_and_dropless_changes_nothing():
    settings = {"top_k": 1, "capacity_factor": 0.5, "eval_capacity_factor": 1.5, "min_capacity": 0}
    assert route("expert_choice", LOGITS, **settings).counts_E.tolist() == [1] * 3
    evaluated = route("expert_choice", LOGITS, training=False, **settings)
    assert evaluated.counts_E.tolist() == [2] * 3
    dropless = route("expert_choice", LOGITS, RouteContext(dropless=True), training=False, **settings)
    assert kept(dropless) == kept(evaluated)
    trained = route("expert_choice", LOGITS, training=False, capacity_tokens=6, **settings)
    assert trained.counts_E.tolist() == [3] * 3


def test_the_choice_carries_gradient_through_its_weights_only():
    logits = LOGITS.clone().requires_grad_()
    routing = choose(logits, factor=1.5)
    (routing.weights_TK * routing.kept_TK).sum().backward()
    assert logits.grad[routing.kept_TK].abs().min() > 0


def test_it_declares_that_it_looks_ahead_drops_nothing_and_needs_no_loss():
    router = ExpertChoiceRouter
    assert (router.causal, router.dropless, router.needs_loss) == (False, True, False)
