"""Who gets a slot, by hand: capacity, groups, orders and reroute through the routers that use them."""

import pytest
import torch

from turnout.kernels import uniform
from turnout.kernels.random import DROP_ORDER
from turnout.moe import RouteContext
from turnout.tests.moe.routing.by_hand import kept, make, route

POLICIES = {
    "switch": ("switch", {}),
    "gshard": ("gshard", {"second_policy": "all"}),
    "expert_choice": ("expert_choice", {"top_k": 1}),
    "sinkhorn1": ("sinkhorn", {}),
    "sinkhorn2": ("sinkhorn", {"top_k": 2}),
    "hash": ("hash", {}),
}
every_policy = pytest.mark.parametrize("policy", POLICIES)
both_modes = pytest.mark.parametrize("training", [True, False])


def run(policy, logits, *, training=True, context=None, **settings):
    """The named policy; the token ids are 0, 1, 2, ..."""
    router, own = POLICIES[policy]
    logits = torch.as_tensor(logits)
    context = context or RouteContext(token_ids_T=torch.arange(len(logits)))
    return route(router, logits, context, training=training, **own | settings)


def numbers(tokens, experts, seed=0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@both_modes
@every_policy
def test_no_tokens(policy, training):
    routing = run(policy, torch.empty(0, 3), training=training)
    assert routing.ids_TK.shape == routing.weights_TK.shape == routing.kept_TK.shape
    assert routing.ids_TK.shape[0] == 0
    assert routing.counts_E.tolist() == [0, 0, 0]
    assert all(loss == 0 for loss in routing.aux.values())


@both_modes
@every_policy
def test_one_token(policy, training):
    routing = run(policy, [[-1.0, 2.0, 1.0]], training=training)
    assert routing.kept_TK.all()
    first = {"hash": [1], "expert_choice": [0, 1, 2]}.get(policy, [1, 2])
    assert routing.ids_TK.tolist() == [first[: routing.ids_TK.shape[1]]]


@both_modes
@pytest.mark.parametrize("policy", ["switch", "expert_choice", "sinkhorn1", "hash"])
def test_one_expert_takes_all(policy, training):
    logits = torch.tensor([[-3.0], [5.0], [0.0]])
    routing = run(policy, logits, training=training, capacity_factor=1.0)
    assert routing.ids_TK.tolist() == [[0]] * 3
    assert routing.kept_TK.all()
    assert torch.equal(routing.weights_TK, logits.sigmoid() if policy == "sinkhorn1" else torch.ones(3, 1))


@both_modes
@pytest.mark.parametrize(("policy", "experts"), [("gshard", 2), ("sinkhorn2", 2), ("expert_choice", 3)])
def test_as_many_choices_as_experts(policy, experts, training):
    settings = {"top_k": 3} if policy == "expert_choice" else {}
    routing = run(policy, numbers(9, experts), training=training, capacity_factor=1.0, **settings)
    assert routing.kept_TK.all()
    assert routing.ids_TK.sort(-1).values.tolist() == [list(range(experts))] * 9


@every_policy
@pytest.mark.parametrize("room", [{"capacity_factor": 50.0}, {"min_capacity": 12}, {"min_capacity": 99}])
def test_a_capacity_of_all_tokens_drops_none(policy, room):
    routing = run(policy, numbers(12, 4), **{"capacity_factor": 0.1, "min_capacity": 0} | room)
    assert torch.equal(routing.kept_TK, routing.wanted_TK)
    assert routing.wanted_TK.all()


@both_modes
@every_policy
def test_decisions_do_not_care_for_a_common_shift(policy, training):
    logits, tight = numbers(20, 4), {"capacity_factor": 0.6, "eval_capacity_factor": 0.6, "min_capacity": 0}
    routing = run(policy, logits, training=training, **tight)
    negative = run(policy, logits - 100, training=training, **tight)
    assert torch.equal(negative.ids_TK, routing.ids_TK)
    assert torch.equal(negative.kept_TK, routing.kept_TK)
    assert not routing.kept_TK.all()


@both_modes
@pytest.mark.parametrize(
    ("policy", "ids", "slots"),
    [
        ("switch", [[0]] * 4, [[1], [1], [0], [0]]),
        ("gshard", [[0, 1]] * 4, [[1, 1], [1, 1], [1, 1], [0, 0]]),
        ("sinkhorn1", [[0]] * 4, [[1], [1], [0], [0]]),
        ("sinkhorn2", [[0, 1]] * 4, [[1, 1], [1, 1], [1, 1], [0, 0]]),
        ("expert_choice", [[0, 1, 2]] * 4, [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_ties_go_to_the_lower_expert_and_the_earlier_token(policy, ids, slots, training):
    same = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 0}  # C = ceil(4 k / 3)
    routing = run(policy, torch.full((4, 3), -2.0), training=training, **same)
    assert routing.ids_TK.tolist() == ids
    assert kept(routing) == slots


def crowd(tokens, experts=4):
    """Every token's best expert is 0, then 1, 2, ..."""
    return torch.arange(experts, 0, -1.0).repeat(tokens, 1)


@pytest.mark.parametrize(
    ("least", "factor", "slots"), [(0, 0.1, 1), (4, 0.1, 4), (4, 1.25, 4), (0, 1.25, 4), (1, 2.0, 5), (40, 0.1, 10)]
)
def test_an_expert_has_at_least_the_least_slots(least, factor, slots):
    routing = route("switch", crowd(10), capacity_factor=factor, min_capacity=least)
    assert kept(routing) == [[1]] * slots + [[0]] * (10 - slots)


ROWS = RouteContext(cu_groups=torch.tensor([0, 4, 4, 6, 12]))


def test_each_row_has_its_own_slots():
    routing = route("switch", crowd(12), ROWS, capacity_factor=2.0, min_capacity=1)
    assert kept(routing) == [[1], [1], [0], [0], [1], [0], [1], [1], [1], [0], [0], [0]]  # ceil(2 n / 4): 2, 1, 3


def test_group_rank_lets_all_rows_at_hand_share_in_training_only():
    settings = {"capacity_factor": 2.0, "eval_capacity_factor": 2.0, "min_capacity": 1, "group": "rank"}
    assert kept(route("switch", crowd(12), ROWS, **settings)) == [[1]] * 6 + [[0]] * 6
    rows = route("switch", crowd(12), ROWS, training=False, **settings | {"group": "row"})
    assert kept(route("switch", crowd(12), ROWS, training=False, **settings)) == kept(rows)


def test_padding_neither_takes_slots_nor_makes_any():
    valid = torch.tensor([False, True, True, False, True, True, False, False])
    routing = route("switch", crowd(8), RouteContext(valid_T=valid), capacity_factor=2.0, min_capacity=0)
    assert kept(routing) == [[0], [1], [1], [0], [0], [0], [0], [0]]  # ceil(2 * 4 / 4) slots
    assert routing.counts_E.tolist() == [4, 0, 0, 0]


# first choices 0, 0, 0, 1 with probability 0.6, 0.9, 0.75, 0.7; second choices the other
PAIRS = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.75, 0.25], [0.3, 0.7]]).log()


@pytest.mark.parametrize(
    ("order", "switch", "gshard"),
    [
        ("token_major", [[1], [0], [0], [1]], [[1, 1], [1, 1], [0, 0], [0, 0]]),
        ("choice_major", [[1], [0], [0], [1]], [[1, 1], [1, 0], [0, 0], [1, 0]]),
        ("probability", [[0], [1], [0], [1]], [[0, 1], [1, 0], [1, 0], [1, 0]]),
    ],
)
def test_orders_by_hand(order, switch, gshard):
    settings = {"min_capacity": 0, "drop_order": order}
    assert kept(route("switch", PAIRS, capacity_factor=0.5, **settings)) == switch  # one slot
    assert kept(route("gshard", PAIRS, capacity_factor=0.5, second_policy="all", **settings)) == gshard  # two


def test_random_order_serves_the_lowest_draws_of_global_indices():
    index = torch.tensor([40, 7, 99, 3, 1000, 12, 5, 77])
    context = RouteContext(index_T=index, seed=5, step=2)
    settings = {"capacity_factor": 1.5, "min_capacity": 0, "drop_order": "random"}
    routing = route("switch", crowd(8), context, layer=3, **settings)  # three slots
    draws = uniform(5, index, step=2, layer=3, purpose=DROP_ORDER)[:, 0]
    best = draws.argsort()[:3]
    assert routing.kept_TK[:, 0].nonzero()[:, 0].tolist() == best.sort().values.tolist()

    back = torch.arange(7, -1, -1)
    turned = route("switch", crowd(8), RouteContext(index_T=index[back], seed=5, step=2), layer=3, **settings)
    assert torch.equal(turned.kept_TK, routing.kept_TK[back])
    others = [RouteContext(index_T=index, seed=5, step=step) for step in range(3, 9)]
    assert any(kept(route("switch", crowd(8), other, layer=3, **settings)) != kept(routing) for other in others)


@pytest.mark.parametrize("order", ["choice_major", "probability", "random"])
def test_evaluation_serves_token_by_token_and_never_reroutes(order):
    settings = {"eval_capacity_factor": 0.5, "min_capacity": 0, "second_policy": "all", "training": False}
    assert kept(route("gshard", PAIRS, drop_order=order, **settings)) == [[1, 1], [1, 1], [0, 0], [0, 0]]
    alone = route("switch", crowd(8), training=False, eval_capacity_factor=0.5, min_capacity=0, reroute=3)
    assert kept(alone) == [[1]] + [[0]] * 7


def test_no_token_is_left_behind_while_there_are_slots():
    settings = {"capacity_factor": 1.0, "min_capacity": 0}  # 2 slots of 4 experts for 8 tokens
    logits = crowd(8)
    for rounds in range(4):
        routing = route("switch", logits, reroute=rounds, **settings)
        placed = 2 * (rounds + 1)
        assert kept(routing) == [[1]] * placed + [[0]] * (8 - placed)
        assert routing.ids_TK[:placed, 0].tolist() == [t // 2 for t in range(placed)]
        assert torch.equal(routing.weights_TK, logits.softmax(-1).gather(1, routing.ids_TK))


def test_a_rerouted_pair_is_weighed_by_its_final_experts():
    logits = crowd(2)
    routing = route(
        "gshard", logits, second_policy="all", reroute=1, capacity_factor=0.5, min_capacity=0
    )  # one slot an expert
    assert routing.ids_TK.tolist() == [[0, 1], [2, 3]]
    assert routing.kept_TK.all()
    pair = torch.tensor([[4.0, 3.0], [2.0, 1.0]]).softmax(-1)
    torch.testing.assert_close(routing.weights_TK, pair)


def test_a_recorded_decision_is_taken_as_it_is():
    logits, settings = numbers(12, 4), {"capacity_factor": 0.5, "min_capacity": 0, "drop_order": "random", "reroute": 1}
    first = route("switch", logits, **settings)
    replayed = RouteContext(replay={0: first.decision}, seed=9)
    again = make("switch", 4, **settings)(-logits, replayed)
    assert torch.equal(again.ids_TK, first.ids_TK)
    assert torch.equal(again.kept_TK, first.kept_TK)
    assert torch.equal(again.weights_TK, (-logits).softmax(-1).gather(1, first.ids_TK))
