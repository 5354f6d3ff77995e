"""What holds for every router, drop order and batch, searched for counter-examples by hypothesis."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.moe.routing.capacity import capacity
from turnout.moe.routing.registry import ROUTERS, build_router

E, WIDTH = 6, 5
ORDERS = ("token_major", "choice_major", "probability", "random")
LEARNED = [name for name in ROUTERS if name != "hash"]
EXAMPLES = settings(max_examples=25, deadline=None)


def _pairs():
    """Every router with every drop order; quick is each router with one of them, so that each order has some."""
    for number, router in enumerate(ROUTERS):
        for place, order in enumerate(ORDERS):
            yield pytest.param(router, order, marks=[] if place == number % len(ORDERS) else pytest.mark.full)


PAIRS = list(_pairs())


def make(router, seed, *, layer=3, **changes):
    options = {"width": WIDTH, "expert_width": 4, "num_experts": E, "router": router, "init_scale": 5.0}
    if router.startswith("deepseek"):
        options |= {"top_k": 3, "expert_groups": 3, "top_groups": 2}
    if router == "expert_choice" and changes.get("capacity_factor", 1.0) is None:
        changes = changes | {"capacity_factor": 1.0}
    module = build_router(MoEConfig(**options | changes), layer)
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return module.train()


@st.composite
def batches(draw, router=None):
    """Hidden states in a few groups, some of them padding, with global indices that are not 0..T-1."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    tokens = sum(lengths)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, WIDTH, generator=generator)
    context = RouteContext(
        cu_groups=torch.tensor([0, *itertools.accumulate(lengths)]),
        valid_T=torch.rand(tokens, generator=generator) > draw(st.sampled_from([0.0, 0.3])),
        token_ids_T=torch.randint(0, 1000, (tokens,), generator=generator),
        index_T=torch.randperm(5000, generator=generator)[:tokens],
        step=draw(st.integers(0, 1000)),
        seed=draw(st.integers(0, 2**40)),
    )
    return x, context, seed


def part(context, start, end, cu):
    return replace(
        context,
        cu_groups=torch.tensor(cu),
        valid_T=context.valid_T[start:end],
        token_ids_T=context.token_ids_T[start:end],
        index_T=context.index_T[start:end],
    )


drops = st.fixed_dictionaries(
    {
        "capacity_factor": st.sampled_from([0.3, 0.7, 1.25, None]),
        "min_capacity": st.integers(0, 3),
        "drop_order": st.sampled_from(ORDERS),
        "reroute": st.integers(0, 2),
    }
)


def options(router, chosen):
    """`reroute` needs experts that a token has not asked, and drops."""
    drops = router not in ("dense", "expert_choice") and chosen.get("capacity_factor") is not None
    return chosen if drops else chosen | {"reroute": 0}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
@EXAMPLES
@given(batch=batches(), chosen=drops)
def test_every_assignment_is_dispatched_or_dropped_and_no_capacity_is_exceeded(router, training, batch, chosen):
    x, context, seed = batch
    module = make(router, seed, **options(router, chosen)).train(training)
    routing, cfg, valid = module(x, context), module.cfg, context.valid_T
    kept, wanted = routing.kept_TK, routing.wanted_TK
    assert not (kept & ~wanted).any()
    assert not wanted[~valid].any()
    assert int(routing.counts_E.sum()) == int(wanted.sum())
    if router == "expert_choice":
        assert torch.equal(kept, wanted)
    elif router != "gshard" or not training:
        assert int(kept.sum()) + int((wanted & ~kept).sum()) == int(valid.sum()) * cfg.top_k
    for ids, asked in zip(routing.ids_TK, wanted, strict=True):
        assert len(set(ids[asked].tolist())) == int(asked.sum())
    factor = cfg.capacity_factor if training else cfg.eval_capacity_factor
    if factor is not None and not module.dropless:
        for start, end in itertools.pairwise(context.cu_groups.tolist()):
            most = capacity(int(valid[start:end].sum()), cfg.top_k, E, factor, cfg.min_capacity)
            here = routing.ids_TK[start:end][kept[start:end]]
            assert torch.bincount(here, minlength=E).max() <= most


@pytest.mark.parametrize("router", LEARNED)
@EXAMPLES
@given(batch=batches(), chosen=drops, data=st.data())
def test_a_permutation_of_the_experts_permutes_the_result(router, batch, chosen, data):
    x, context, seed = batch
    chosen = chosen | {"drop_order": "probability"} if router == "noisy_topk" else chosen
    module = make(router, seed, **options(router, chosen))
    groups = module.cfg.expert_groups
    order = torch.tensor(data.draw(st.permutations(range(groups if groups > 1 else E))))
    order = (order[:, None] * (E // len(order)) + torch.arange(E // len(order))).flatten()
    # noise belongs to an expert's number, so a noisy router is compared without it
    module.train(router not in ("noisy_topk",))
    permuted = make(router, seed, **options(router, chosen)).train(module.training)
    for tensor in [*permuted.parameters(), *permuted.buffers()]:
        tensor.data = tensor.data[order]
    before, after = module(x, context), permuted(x, context)

    def mixture(routing, to=None):
        table = torch.zeros(len(x), E)
        ids = routing.ids_TK if to is None else to[routing.ids_TK]
        return table.scatter_add(1, ids, routing.weights_TK.detach() * routing.kept_TK)

    torch.testing.assert_close(mixture(after, order), mixture(before), rtol=1e-4, atol=1e-6)
    assert torch.equal(after.counts_E, before.counts_E[order])


@pytest.mark.parametrize(("router", "order"), PAIRS)
@EXAMPLES
@given(batch=batches(), chosen=drops)
def test_padding_changes_nothing(router, order, batch, chosen):
    x, context, seed = batch
    valid = context.valid_T
    module = make(router, seed, **options(router, chosen | {"drop_order": order}))
    with_padding = module(x, context)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), valid.long().cumsum(0)])[context.cu_groups]
    own = {"token_ids_T": context.token_ids_T[valid], "index_T": context.index_T[valid]}
    without = module(x[valid], replace(context, cu_groups=ends, valid_T=None, **own))
    for name in ("ids_TK", "kept_TK", "wanted_TK"):
        assert torch.equal(getattr(with_padding, name)[valid], getattr(without, name)), name
    torch.testing.assert_close(with_padding.weights_TK[valid], without.weights_TK)
    for name, loss in with_padding.aux.items():
        torch.testing.assert_close(loss, without.aux[name])


@pytest.mark.parametrize(("router", "order"), PAIRS)
@EXAMPLES
@given(batch=batches(), chosen=drops)
def test_every_layout_draws_the_same_and_decides_the_same(router, order, batch, chosen):
    x, context, seed = batch
    chosen = options(router, chosen | {"drop_order": order, "jitter": 0.0 if router == "hash" else 0.1})
    module = make(router, seed, **chosen)
    whole, cu = module(x, context), context.cu_groups.tolist()
    for start, end in itertools.pairwise(cu):
        alone = module(x[start:end], part(context, start, end, [0, end - start]))
        for name in ("ids_TK", "kept_TK", "wanted_TK"):
            assert torch.equal(getattr(alone, name), getattr(whole, name)[start:end]), name


@pytest.mark.parametrize("router", ["switch", "gshard", "topk_softmax", "deepseek_v3"])
@EXAMPLES
@given(batch=batches(), chosen=drops)
def test_load_and_balance_are_about_what_was_chosen_before_drops_and_reroutes(router, batch, chosen):
    x, context, seed = batch
    chosen = chosen | {"capacity_factor": 0.7}
    routing = make(router, seed, **chosen | {"reroute": 1})(x, context)
    dropless = make(router, seed, **chosen | {"reroute": 0, "capacity_factor": None})(x, context)
    assert torch.equal(routing.counts_E, dropless.counts_E)
    for name, loss in dropless.aux.items():
        torch.testing.assert_close(routing.aux[name], loss)


def outputs(router, seed, x, context, training, **changes):
    module = make(router, seed, layer=3, **changes)
    layer = MoE(replace(module.cfg, noncausal=True), 3).train(training)
    layer.router.load_state_dict(module.state_dict())
    torch.manual_seed(0)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    return layer, layer(x, context)[0]


def looks_ahead(router, training, seed, **changes):
    """Whether some token's output changed when only later tokens changed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, WIDTH, generator=generator)
    ids = torch.randint(0, 1000, (16,), generator=generator)
    layer, before = outputs(router, seed, x, RouteContext(token_ids_T=ids), training, **changes)
    for t in (3, 9, 14):
        later, other = x.clone(), ids.clone()
        later[t + 1 :] = torch.randn(15 - t, WIDTH, generator=generator)
        other[t + 1 :] = 7
        after = layer(later, RouteContext(token_ids_T=other))[0]
        if not torch.allclose(after[: t + 1], before[: t + 1], atol=1e-5):
            return True
    return False


@pytest.mark.parametrize("router", ROUTERS)
def test_in_evaluation_a_causal_router_never_looks_ahead_and_another_does(router):
    tight = {"eval_capacity_factor": 0.5, "min_capacity": 1, "capacity_tokens": 16}
    found = [looks_ahead(router, False, seed, **tight) for seed in range(12)]
    assert any(found) == (not ROUTERS[router].causal)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reroute", [0, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_in_training_a_policy_looks_ahead_exactly_when_it_says_so(router, order, reroute):
    tight = options(router, {"capacity_factor": 0.5, "min_capacity": 1, "drop_order": order, "reroute": reroute})
    found = [looks_ahead(router, True, seed, **tight) for seed in range(24)]
    assert any(found) == (not make(router, 0, **tight).causal_in_training)
