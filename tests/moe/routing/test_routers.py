"""Switch and GShard on logits made by hand: who goes where, with which weight, and what never matters."""

import itertools

import pytest
import torch

from turnout import NonFiniteError
from turnout.moe import MoEConfig, RouteContext
from turnout.moe.routing.registry import build_router


def make(router, logits=None, *, training=True, experts=None, **settings):
    """A router whose logits are its input: width = experts, weight = identity."""
    experts = experts or len(logits[0])
    top_k = {"switch": 1, "gshard": 2}[router]
    cfg = MoEConfig(width=experts, expert_width=4, num_experts=experts, top_k=top_k, router=router, **settings)
    module = build_router(cfg).train(training)
    module.weight.data = torch.eye(experts)
    return module


def route(router, logits, context=None, **settings):
    return make(router, logits, **settings)(torch.tensor(logits), context or RouteContext())


ALWAYS = {"switch": {}, "gshard": {"second_policy": "all"}}
LOGITS = [[0.0, 2.0, 1.0], [3.0, 3.0, 3.0], [-9.0, -5.0, -2.0], [1.0, 1.0, 4.0]]


def test_switch_takes_the_best_with_its_own_probability():
    routing = route("switch", LOGITS)
    assert routing.ids_TK.tolist() == [[1], [0], [2], [2]]  # ties go to the lower index, negatives are no obstacle
    probabilities = torch.tensor(LOGITS).softmax(-1)
    assert torch.equal(routing.weights_TK[:, 0], probabilities[range(4), [1, 0, 2, 2]])
    assert routing.weights_TK[1].item() == pytest.approx(1 / 3)
    assert routing.counts_E.tolist() == [1, 1, 2]
    assert routing.kept_TK.all()


def test_gshard_takes_the_best_two_with_gates_that_sum_to_one():
    routing = route("gshard", LOGITS, second_policy="all")
    assert routing.ids_TK.tolist() == [[1, 2], [0, 1], [2, 1], [2, 0]]
    ratio = torch.tensor([1.0, 0.0, 3.0, 3.0]).exp()  # g1 / g2
    expected = torch.stack((ratio / (1 + ratio), 1 / (1 + ratio)), dim=1)
    torch.testing.assert_close(routing.weights_TK, expected)
    assert routing.counts_E.tolist() == [2, 3, 3]


def test_gates_are_normalised_before_dropping_and_not_after():
    logits = [[2.0, 1.0, 0.0]] * 8
    routing = route("gshard", logits, second_policy="all", capacity_factor=0.5, min_capacity=0)
    assert routing.kept_TK.sum(0).tolist() == [3, 3]  # ceil(0.5 * 8 * 2 / 3)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(8))


@pytest.mark.parametrize(("order", "kept"), [("token_major", [[1, 1], [0, 0]]), ("choice_major", [[1, 0], [1, 0]])])
def test_drop_order_decides_who_loses(order, kept):
    logits = [[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]
    settings = {"second_policy": "all", "capacity_factor": 0.5, "min_capacity": 0, "drop_order": order}
    assert route("gshard", logits, **settings).kept_TK.int().tolist() == kept


def test_experts_are_chosen_by_logits_also_where_probabilities_underflow():
    routing = route("gshard", [[0.0, 200.0, 400.0]], second_policy="all")
    assert routing.probs_TE[0, :2].tolist() == [0.0, 0.0]
    assert routing.ids_TK.tolist() == [[2, 1]]


@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(router, tokens):
    x = torch.tensor(LOGITS)[:tokens]
    routing = make(router, LOGITS, **ALWAYS[router])(x, RouteContext())
    assert routing.ids_TK.shape == (tokens, 2 if router == "gshard" else 1)
    assert routing.kept_TK.sum() == routing.counts_E.sum() == routing.ids_TK.numel()
    assert all(loss.isfinite() for loss in routing.aux.values())


def test_one_expert_takes_all_with_weight_one():
    routing = route("switch", [[-3.0], [5.0]], capacity_factor=1.0)
    assert routing.ids_TK.tolist() == [[0], [0]]
    assert routing.weights_TK.tolist() == [[1.0], [1.0]]
    assert routing.kept_TK.all()


def test_as_many_choices_as_experts():
    routing = route("gshard", [[1.0, 0.0], [0.0, 1.0]], second_policy="all")
    assert routing.ids_TK.tolist() == [[0, 1], [1, 0]]
    assert routing.kept_TK.all()


@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_padding_routes_nowhere_and_counts_nowhere(router):
    logits = [[2.0, 1.0, 0.0]] * 6
    valid = torch.tensor([False, True, False, True, True, False])
    settings = ALWAYS[router] | {"capacity_factor": 0.75, "min_capacity": 0}
    routing = route(router, logits, RouteContext(valid_T=valid), **settings)
    assert torch.equal(routing.wanted_TK, valid[:, None].expand_as(routing.wanted_TK))
    assert not routing.kept_TK[~valid].any()
    slots = 1 if router == "switch" else 2  # ceil(0.75 * 3 * k / 3): of the valid tokens alone
    assert routing.kept_TK[valid].sum(0).tolist() == [slots] * routing.ids_TK.shape[1]
    assert routing.counts_E.sum() == 3 * routing.ids_TK.shape[1]
    alone = route(router, [logits[0]] * 3, **settings | {"capacity_factor": None})
    for name, loss in routing.aux.items():
        torch.testing.assert_close(loss, alone.aux[name])


@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("order", ["token_major", "choice_major"])
def test_groups_never_influence_each_other(router, order):
    torch.manual_seed(0)
    module = make(router, experts=4, capacity_factor=0.6, min_capacity=1, drop_order=order)
    x, cu = torch.randn(21, 4), [0, 8, 9, 9, 21]
    together = module(x, RouteContext(cu_groups=torch.tensor(cu)))
    assert not together.kept_TK.all()
    for start, end in itertools.pairwise(cu):
        index = torch.arange(start, end)
        alone = module(x[start:end], RouteContext(index_T=index))
        assert torch.equal(alone.kept_TK, together.kept_TK[start:end])
        assert torch.equal(alone.ids_TK, together.ids_TK[start:end])


@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_losses_of_parts_add_up_to_the_loss_of_the_whole(router):
    torch.manual_seed(0)
    module = make(router, experts=4)
    x, cu = torch.randn(24, 4), torch.tensor([0, 8, 16, 24])
    whole = module(x, RouteContext(cu_groups=cu)).aux
    parts = [
        module(x[:8], RouteContext(total_tokens=24)).aux,
        module(x[8:], RouteContext(cu_groups=torch.tensor([0, 8, 16]), total_tokens=24)).aux,
    ]
    assert set(whole) == {"balance", "z"}
    for name in whole:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])


def test_in_evaluation_a_tokens_fate_does_not_depend_on_what_follows():
    torch.manual_seed(0)
    module = make("gshard", experts=4, training=False, eval_capacity_factor=0.7, capacity_tokens=12, min_capacity=0)
    x = torch.randn(30, 4)
    whole = module(x, RouteContext())
    assert not whole.kept_TK.all()
    for length in (1, 5, 12, 29):
        assert torch.equal(module(x[:length], RouteContext()).kept_TK, whole.kept_TK[:length])


def test_evaluation_has_its_own_factor_and_no_losses():
    logits = [[1.0, 0.0, 0.0, 0.0]] * 16
    settings = {"capacity_factor": 1.0, "eval_capacity_factor": 2.0, "min_capacity": 0}
    assert route("switch", logits, **settings).kept_TK.sum() == 4
    evaluated = route("switch", logits, training=False, **settings)
    assert evaluated.kept_TK.sum() == 8
    assert evaluated.aux == {}
    assert route("switch", logits, RouteContext(dropless=True), training=False, **settings).kept_TK.all()


def test_training_capacity_comes_from_the_row_at_hand():
    logits = [[1.0, 0.0, 0.0, 0.0]] * 16
    routing = route("switch", logits, capacity_factor=1.0, min_capacity=0, capacity_tokens=400)
    assert routing.kept_TK.sum() == 4


def test_second_expert_is_drawn_with_twice_its_gate():
    tokens = 20_000
    logits = torch.tensor([[1.5, 0.0]]).expand(tokens, 2)
    module = make("gshard", [[0.0, 0.0]], capacity_factor=None)
    routing = module(logits, RouteContext(seed=3))
    wanted = 2 * torch.tensor([1.5, 0.0]).softmax(-1)[1].item()
    assert routing.kept_TK[:, 0].all()
    assert abs(routing.kept_TK[:, 1].float().mean() - wanted) < 4 * (wanted * (1 - wanted) / tokens) ** 0.5
    assert torch.equal(routing.kept_TK, module(logits, RouteContext(seed=3)).kept_TK)
    for other in ({"seed": 4}, {"seed": 3, "step": 1}, {"seed": 3, "index_T": torch.arange(tokens) + 7}):
        assert not torch.equal(routing.kept_TK, module(logits, RouteContext(**other)).kept_TK)


def test_second_expert_is_certain_at_equal_gates_in_evaluation_and_under_policy_all():
    equal, unequal = [[1.0, 1.0, 0.0]] * 50, [[9.0, 1.0, 0.0]] * 50
    free = {"capacity_factor": None, "eval_capacity_factor": None}
    assert route("gshard", equal, **free).kept_TK.all()
    assert not route("gshard", unequal, **free).kept_TK[:, 1].all()
    assert route("gshard", unequal, **free, second_policy="all").kept_TK.all()
    assert route("gshard", unequal, **free, training=False).kept_TK.all()


def test_jitter_scales_each_input_in_training_only_and_by_its_index():
    module = make("switch", experts=8, jitter=0.1)
    x = torch.ones(200, 8)
    scaled = module.jitter(x, RouteContext())
    assert 0.9 <= scaled.min() < 0.91
    assert 1.09 < scaled.max() <= 1.1
    assert abs(scaled.mean() - 1) < 0.01
    part = module.jitter(x[50:60], RouteContext(index_T=torch.arange(50, 60)))
    assert torch.equal(part, scaled[50:60])
    assert module.eval().jitter(x, RouteContext()) is x


@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_routing_is_float32_whatever_surrounds_it(router):
    torch.manual_seed(0)
    module = make(router, experts=4)
    x = torch.randn(40, 4).bfloat16()
    plain = module(x.float(), RouteContext())
    with torch.autocast("cpu", torch.bfloat16):
        routing = module(x, RouteContext())
    assert {routing.weights_TK.dtype, routing.probs_TE.dtype, routing.logits_TE.dtype} == {torch.float32}
    assert torch.equal(routing.logits_TE, plain.logits_TE)
    assert torch.equal(routing.ids_TK, plain.ids_TK)


@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_a_nan_logit_is_an_error_that_names_layer_and_token(router):
    logits = [[0.0, 2.0, 1.0], [0.0, float("nan"), 1.0], [1.0, 0.0, 0.0]]
    with pytest.raises(NonFiniteError, match=r"layer 0 \(NaN for 1 of 3 tokens, first token 1\)"):
        route(router, logits)
    padding = RouteContext(valid_T=torch.tensor([True, False, True]))
    assert route(router, logits, padding).weights_TK.isfinite().all()


@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_propagated_nan_logits_make_their_own_token_nan_and_no_other(router):
    logits = [[0.0, 2.0, 1.0], [0.0, float("nan"), 1.0], [1.0, 0.0, 0.0]]
    routing = route(router, logits, RouteContext(propagate_nan=True), **ALWAYS[router])
    assert routing.weights_TK[1].isnan().all()
    assert routing.weights_TK[[0, 2]].isfinite().all()
    assert ((routing.ids_TK >= 0) & (routing.ids_TK < 3)).all()
    assert all(loss.isnan() for loss in routing.aux.values())


def test_router_starts_small():
    torch.manual_seed(0)
    cfg = MoEConfig(width=400, expert_width=4, num_experts=100)
    weight, sigma = build_router(cfg).weight, (0.1 / 400) ** 0.5
    assert weight.abs().max() <= 2 * sigma
    assert weight.std().item() == pytest.approx(0.88 * sigma, rel=0.02)  # a normal cut at two sigma


def test_routing_is_immutable_and_a_pytree():
    routing = route("switch", LOGITS)
    with pytest.raises(AttributeError):
        routing.ids_TK = None
    leaves, spec = torch.utils._pytree.tree_flatten(routing)
    names = ("ids_TK", "weights_TK", "wanted_TK", "kept_TK", "logits_TE", "shares_TE")
    assert all(leaf is getattr(routing, name) for leaf, name in zip(leaves, names, strict=False))
    assert len(leaves) == len(names) + len(routing.aux) + 1
    assert leaves[-1] is routing.asked_TK is None
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.kept_TK, routing.kept_TK)
    assert torch.equal(again.wanted_TK, routing.wanted_TK)
    assert again.sigmoid is routing.sigmoid
    assert set(again.aux) == set(routing.aux)
