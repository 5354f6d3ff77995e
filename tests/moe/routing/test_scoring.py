"""The routers that score and pick: exact choices and weights on numbers made by hand, and what must never matter."""

import math

import pytest
import torch

from turnout import NonFiniteError
from turnout.kernels.reference.gates import within_best_groups
from turnout.moe import MoEConfig, RouteContext
from turnout.moe.routing.registry import build_router

ROUTERS = ("dense", "softmax", "noisy_topk", "topk_softmax", "gpt_oss", "deepseek_v2", "deepseek_v3")
SPARSE = ROUTERS[1:]
NAN = float("nan")


def make(router, experts=4, *, training=False, layer=0, **settings):
    """A router whose logits are its input: width = experts, weight = identity."""
    if router == "noisy_topk":
        settings = {"load_loss": 0.0, **settings}
    cfg = MoEConfig(
        width=experts, expert_width=4, num_experts=experts, router=router, **{"capacity_factor": None, **settings}
    )
    module = build_router(cfg, layer).train(training)
    module.weight.data = torch.eye(experts)
    return module


def route(router, logits, context=None, **settings):
    logits = torch.as_tensor(logits)
    return make(router, logits.shape[1], **settings)(logits, context or RouteContext())


def chosen(routing):
    return routing.ids_TK.tolist()


def close(got, wanted):
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=got.dtype))


# probabilities in tenths: [.1 .2 .3 .4], [.4 .1 .3 .2], and a tie at [.2 .2 .2 .4]
LOGITS = torch.tensor([[1.0, 2, 3, 4], [4, 1, 3, 2], [2, 2, 2, 4]]).log()


def test_dense_asks_every_expert_in_order():
    routing = route("dense", LOGITS)
    assert chosen(routing) == [[0, 1, 2, 3]] * 3
    close(routing.weights_TK, [[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2], [0.2, 0.2, 0.2, 0.4]])


def test_softmax_keeps_its_probabilities():
    routing = route("softmax", LOGITS)
    assert chosen(routing) == [[3, 2], [0, 2], [3, 0]]
    close(routing.weights_TK, [[0.4, 0.3], [0.4, 0.3], [0.4, 0.2]])


@pytest.mark.parametrize("router", ["topk_softmax", "gpt_oss", "noisy_topk", "deepseek_v2", "deepseek_v3"])
def test_renormalised_weights_are_shares_of_the_chosen(router):
    settings = {"renormalize": True} if router in ("topk_softmax", "deepseek_v2", "deepseek_v3") else {}
    logits = torch.logit(LOGITS.softmax(-1)) if router == "deepseek_v3" else LOGITS
    routing = route(router, logits, **settings)
    assert chosen(routing) == [[3, 2], [0, 2], [3, 0]]
    close(routing.weights_TK, [[4 / 7, 3 / 7], [4 / 7, 3 / 7], [2 / 3, 1 / 3]])


def test_renormalize_false_leaves_the_scores():
    close(route("topk_softmax", LOGITS, renormalize=False).weights_TK, [[0.4, 0.3], [0.4, 0.3], [0.4, 0.2]])
    close(route("deepseek_v2", LOGITS, route_scale=5.0).weights_TK, [[2.0, 1.5], [2.0, 1.5], [2.0, 1.0]])
    sigmoid = route("deepseek_v3", torch.logit(LOGITS.exp() / 10), renormalize=False, route_scale=5.0)
    close(sigmoid.weights_TK, [[2.0, 1.5], [2.0, 1.5], [2.0, 1.0]])


def test_gpt_oss_adds_its_bias_to_the_logits():
    module = make("gpt_oss")
    assert not module.bias.any()
    module.bias.data = torch.tensor([6.0, 1, 1, 1]).log()
    routing = module(LOGITS[:1], RouteContext())
    assert chosen(routing) == [[0, 3]]
    close(routing.weights_TK, [[0.6, 0.4]])
    close(routing.probs_TE, [[0.4, 2 / 15, 0.2, 4 / 15]])


GROUPS = {"expert_groups": 2, "top_groups": 1}


def test_deepseek_v2_takes_the_group_with_the_best_expert():
    routing = route("deepseek_v2", LOGITS, **GROUPS)
    assert chosen(routing) == [[3, 2], [0, 1], [3, 2]]
    close(routing.weights_TK, [[0.4, 0.3], [0.4, 0.1], [0.4, 0.2]])


def test_deepseek_v2_never_leaves_the_group_where_softmax_rounds_to_zero():
    routing = route("deepseek_v2", [[-500.0, 200.0, 100.0, 100.0]], **GROUPS)
    assert chosen(routing) == [[1, 0]]
    close(routing.weights_TK, [[1.0, 0.0]])


SCORES = torch.tensor([[0.8, 0.1, 0.6, 0.5]])


def test_deepseek_v3_takes_the_group_with_the_best_pair():
    routing = route("deepseek_v3", SCORES.logit(), **GROUPS, route_scale=2.5)
    assert chosen(routing) == [[2, 3]]
    close(routing.weights_TK, [[2.5 * 6 / 11, 2.5 * 5 / 11]])
    close(routing.probs_TE, [[0.4, 0.05, 0.3, 0.25]])


@pytest.mark.parametrize(
    ("bias", "ids", "weights"),
    [
        ([0.0, 0.5, 0.0, 0.0], [0, 1], [8 / 9, 1 / 9]),  # moves the choice of group, touches no weight
        ([0.0, 0.8, 0.0, 0.0], [1, 0], [1 / 9, 8 / 9]),  # best first by s + b, not by weight
        ([-2.0, -2.0, -3.0, -3.0], [0, 1], [8 / 9, 1 / 9]),  # all negative: a masked-out 0 would win
        ([-9.0, 0.0, -0.05, -0.05], [2, 3], [6 / 11, 5 / 11]),
    ],
)
def test_deepseek_v3_bias_chooses_and_never_weighs(bias, ids, weights):
    module = make("deepseek_v3", **GROUPS)
    module.balance_bias.copy_(torch.tensor(bias))
    routing = module(SCORES.logit(), RouteContext())
    assert chosen(routing) == [ids]
    close(routing.weights_TK, [weights])
    close(routing.probs_TE, [[0.4, 0.05, 0.3, 0.25]])


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_best_groups_are_those_of_a_plain_loop(best, top):
    rank_TE = torch.randint(-4, 3, (200, 9), generator=torch.Generator().manual_seed(best)).float()
    got = within_best_groups(rank_TE, 3, top, best)
    for row, masked in zip(rank_TE.tolist(), got.tolist(), strict=True):
        score = [sum(sorted(row[3 * g : 3 * g + 3])[-best:]) for g in range(3)]
        groups = sorted(range(3), key=lambda g: -score[g])[:top]
        assert masked == [value if e // 3 in groups else -math.inf for e, value in enumerate(row)]


@pytest.mark.parametrize("router", ["deepseek_v2", "deepseek_v3"])
def test_a_retry_stays_within_the_groups(router):
    settings = {"top_k": 1, "renormalize": False, "capacity_factor": 0.8, "min_capacity": 0}  # one slot an expert
    routing = route(router, [[4.0, 2.0, 3.0, 1.0]] * 5, training=True, reroute=3, **GROUPS, **settings)
    assert routing.kept_TK[:, 0].tolist() == [True, True, False, False, False]
    assert routing.ids_TK[:2, 0].tolist() == [0, 1]


@pytest.mark.parametrize("router", SPARSE)
def test_ties_go_to_the_lower_index(router):
    groups = {"expert_groups": 3, "top_groups": 2} if router.startswith("deepseek") else {}
    assert chosen(route(router, torch.full((3, 6), 0.7), top_k=3, **groups)) == [[0, 1, 2]] * 3


SHARES = torch.tensor([0.0, -1.0]).softmax(-1).tolist()  # of the two best among -1000, -1001, -1002, -1004
PROBABILITIES = torch.tensor([0.0, -1.0, -2.0, -4.0]).softmax(-1)[:2].tolist()


@pytest.mark.parametrize(
    ("router", "ids", "weights"),
    [
        ("softmax", [3, 1], PROBABILITIES),
        ("noisy_topk", [3, 1], SHARES),
        ("topk_softmax", [3, 1], SHARES),
        ("gpt_oss", [3, 1], SHARES),
        ("deepseek_v2", [3, 1], PROBABILITIES),
        ("deepseek_v3", [0, 1], SHARES[::-1]),  # every sigmoid is 0 in float32: a tie, weighed by the true shares
    ],
)
def test_logits_far_below_zero(router, ids, weights):
    logits = torch.tensor([[-1002.0, -1001.0, -1004.0, -1000.0]], requires_grad=True)
    routing = route(router, logits)
    assert chosen(routing) == [ids]
    close(routing.weights_TK, [weights])
    routing.weights_TK[0, 0].backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_nan_logits_of_a_valid_token_raise(router, training):
    logits = torch.tensor([[0.0, 2, 1], [0, NAN, 1], [1, 0, 0]])
    with pytest.raises(NonFiniteError, match=r"layer 5 .*1 of 3 tokens, first token 1"):
        route(router, logits, training=training, layer=5)


@pytest.mark.parametrize("router", ROUTERS)
def test_nan_stays_in_its_token_when_asked_to_propagate(router):
    logits = torch.tensor([[0.0, 2, 1], [0, NAN, 1], [1, 0, 0]])
    for training in (True, False):
        routing = route(router, logits, RouteContext(propagate_nan=True), training=training)
        assert routing.weights_TK[1].isnan().all()
        assert routing.weights_TK[[0, 2]].isfinite().all()
        assert ((routing.ids_TK >= 0) & (routing.ids_TK < 3)).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_may_hold_anything(router):
    module = make(router, training=True)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([True, False, True, True, False, True])
    poisoned = x.masked_fill(~valid[:, None], NAN).requires_grad_()
    routing = module(poisoned, RouteContext(valid_T=valid))
    alone = module(x[valid], RouteContext(index_T=valid.nonzero()[:, 0]))
    assert torch.equal(routing.ids_TK[valid], alone.ids_TK)
    assert torch.equal(routing.weights_TK[valid], alone.weights_TK)
    assert torch.equal(routing.counts_E, alone.counts_E)
    assert not routing.kept_TK[~valid].any()
    (routing.weights_TK[valid, 0].sum() + sum(routing.aux.values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert poisoned.grad.isfinite().all()


def test_a_choice_that_nan_would_make_in_silence_raises():
    with pytest.raises(NonFiniteError):
        route("softmax", [[0.0, float("inf"), 1.0]])
    biased = make("deepseek_v3")
    biased.balance_bias[1] = NAN
    noisy = make("noisy_topk", training=True)
    noisy.noise_weight.data[1] = NAN
    for module in (biased, noisy):
        with pytest.raises(NonFiniteError):
            module(torch.randn(3, 4), RouteContext())


@pytest.mark.parametrize("router", ROUTERS)
def test_all_experts_can_be_chosen(router):
    routing = route(router, LOGITS, top_k=4, **({"renormalize": False} if router == "topk_softmax" else {}))
    gates = routing.logits_TE.softmax(-1)
    if router == "deepseek_v3":
        gates = routing.logits_TE.sigmoid() / routing.logits_TE.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK, gates.gather(1, routing.ids_TK))
    torch.testing.assert_close(routing.probs_TE, gates)
    assert torch.equal(routing.ids_TK.sort(-1).values, torch.arange(4).expand(3, 4))
    if router != "dense":
        assert (routing.weights_TK.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_one_expert_gets_everything(router, training):
    routing = route(router, [[3.0], [-7.0]], top_k=1, training=training)
    assert chosen(routing) == [[0], [0]]
    assert routing.weights_TK.tolist() == [[1.0], [1.0]]
    assert routing.counts_E.tolist() == [2]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_no_token_and_one_token_are_ordinary(router, training):
    groups = GROUPS if router.startswith("deepseek") else {}
    module = make(router, training=training, **groups)
    whole = module(LOGITS, RouteContext())
    for tokens in (0, 1):
        x = LOGITS[:tokens].clone().requires_grad_()
        part = module(x, RouteContext())
        assert part.ids_TK.shape == part.weights_TK.shape == (tokens, module.cfg.top_k)
        assert torch.equal(part.ids_TK, whole.ids_TK[:tokens])
        assert torch.equal(part.weights_TK, whole.weights_TK[:tokens])
        assert part.counts_E.sum() == tokens * module.cfg.top_k
        part.weights_TK.sum().backward()
        assert x.grad.shape == (tokens, 4)


@pytest.mark.parametrize("router", ROUTERS)
def test_room_for_everyone_is_no_capacity_at_all(router):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    roomy, free = (make(router, training=True, capacity_factor=factor) for factor in (100.0, None))
    got, wanted = roomy(x, RouteContext()), free(x, RouteContext())
    assert got.kept_TK.all()
    assert torch.equal(got.ids_TK, wanted.ids_TK)
    assert torch.equal(got.weights_TK, wanted.weights_TK)


def test_dense_drops_nothing_whatever_the_capacity():
    assert route("dense", LOGITS, training=True, capacity_factor=0.1, min_capacity=0).kept_TK.all()


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_have_the_gradient_of_their_formula(router):
    """Finite differences in float64, through every parameter (the noise's among them) and the input."""
    groups = GROUPS if router.startswith("deepseek") else {}
    module = make(router, training=True, **groups).double()
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def weights(x, *parameters):
        return torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x, RouteContext())
        ).weights_TK

    assert torch.autograd.gradcheck(weights, (x, *parameters))
    weights(x, *parameters)[:, 0].sum().backward()
    assert all(parameter.grad.any() for parameter in parameters)
    assert set(names) == {"weight"} | {"noisy_topk": {"noise_weight"}, "gpt_oss": {"bias"}}.get(router, set())


@pytest.mark.parametrize("router", ROUTERS)
def test_replay_weighs_the_recorded_choice(router):
    module = make(router, training=True, layer=3)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    first = module(x, RouteContext(seed=1))
    again = module(x, RouteContext(seed=1, replay={3: first.decision}))
    assert torch.equal(again.weights_TK, first.weights_TK)
    flipped = module(x, RouteContext(seed=1, replay={3: module(-x, RouteContext(seed=1)).decision}))
    assert torch.equal(flipped.ids_TK, module(-x, RouteContext(seed=1)).ids_TK)
    assert flipped.weights_TK.isfinite().all()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_is_never_narrowed_below_float32(router):
    def dtypes(module):
        return {tensor.dtype for tensor in module.state_dict().values()}

    for narrow in ("bfloat16", "half"):
        assert dtypes(getattr(make(router), narrow)()) == {torch.float32}
        assert dtypes(getattr(make(router).double(), narrow)()) == {torch.float32}
    assert dtypes(make(router).to(torch.bfloat16)) == {torch.float32}
    wide = make(router, training=True).double()
    assert dtypes(wide) == {torch.float64}
    routing = wide(LOGITS.bfloat16(), RouteContext())
    assert {routing.weights_TK.dtype, routing.probs_TE.dtype, routing.logits_TE.dtype} == {torch.float64}


@pytest.mark.parametrize("router", ROUTERS)
def test_routing_is_float32_whatever_surrounds_it(router):
    module = make(router, training=True)
    module.weight.data = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = module(x.float(), RouteContext())
    with torch.autocast("cpu", torch.bfloat16):
        routing = module(x, RouteContext())
    assert {routing.weights_TK.dtype, routing.probs_TE.dtype, routing.logits_TE.dtype} == {torch.float32}
    for name in ("logits_TE", "ids_TK", "weights_TK"):
        assert torch.equal(getattr(routing, name), getattr(plain, name))


def test_the_bias_of_deepseek_v3_is_a_saved_buffer():
    module = make("deepseek_v3")
    assert module.state_dict()["balance_bias"].tolist() == [0.0] * 4
    assert not module.balance_bias.requires_grad
    module.balance_bias.fill_(1.5)
    again = make("deepseek_v3")
    again.load_state_dict(module.state_dict())
    assert again.balance_bias.tolist() == [1.5] * 4
    again.reset_parameters()
    assert not again.balance_bias.any()


def test_what_each_router_says_of_itself():
    modules = {router: make(router) for router in ROUTERS}
    assert all(module.causal for module in modules.values())
    assert {router for router in ROUTERS if modules[router].dropless} == {"dense"}
    assert {router for router in ROUTERS if not modules[router].needs_loss} == {"dense", "deepseek_v3"}
