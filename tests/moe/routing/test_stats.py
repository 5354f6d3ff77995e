"""The routing numbers that people see: by hand, additive, without padding, and the same whoever routes.

The hand-made routings hold what a router would: 4 experts, 2 layers, chosen so that every number is easy to compute.
"""

import math

import pytest
import torch

from turnout.moe.config import MoEConfig
from turnout.moe.routing.record import RouteContext, Routing
from turnout.moe.routing.registry import ROUTERS, build_router
from turnout.moe.routing.stats import RoutingStats
from turnout.parallel import process
from turnout.tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
UNDECIDED, SURE = [0.25] * 4, [1.0, 0.0, 0.0, 0.0]


def routing(ids, kept, probs, logits, wanted=None):
    ids_TK = torch.tensor(ids)
    wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool) if wanted is None else torch.tensor(wanted)
    return Routing(
        ids_TK=ids_TK,
        weights_TK=torch.ones(ids_TK.shape),
        wanted_TK=wanted_TK,
        kept_TK=torch.tensor(kept) & wanted_TK,
        shares_TE=torch.tensor(probs),
        logits_TE=torch.tensor(logits),
    )


def two_tokens():
    """Expert 0 twice, 1 and 2 once; the second token's first choice finds no slot."""
    logits = [[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    return routing([[0, 1], [0, 2]], [[True, True], [False, True]], [UNDECIDED, SURE], logits)


def one_token():
    """The second choice was not drawn: it asks for nothing."""
    return routing([[0, 1]], [[True, False]], [SURE], [[0.0, 0.0, 2.0, 0.0]], wanted=[[True, False]])


def test_every_field_by_hand():
    stats = RoutingStats((1, 3), 4, CPU)
    stats.add({1: two_tokens(), 3: one_token()})
    stats.add({1: one_token(), 3: one_token()})
    found = stats.fields()
    assert found["moe_layers"] == [1, 3]
    assert found["expert_load"] == [pytest.approx([3 / 5, 1 / 5, 1 / 5, 0]), [1, 0, 0, 0]]
    assert found["load_max_mean"] == pytest.approx([12 / 5, 4])
    deviations = [12 / 5 - 1, 4 / 5 - 1, 4 / 5 - 1, -1]
    assert found["load_cv"] == pytest.approx([math.sqrt(sum(d * d for d in deviations) / 4), math.sqrt(3)])
    assert found["router_entropy"] == pytest.approx([math.log(4) / 3, 0])
    assert found["dead_experts"] == [1, 3]
    assert found["layer_drop_fraction"] == pytest.approx([1 / 6, 0]), "one of 3 tokens · 2; what asks for nothing: none"
    assert found["drop_fraction"] == pytest.approx(1 / 12)
    assert found["router_logit_norm"] == pytest.approx([(5 + 1 + 2) / 3, 2])
    assert stats.snapshot().counts() == [[3, 1, 1, 0], [2, 0, 0, 0]]


@pytest.mark.parametrize("together", [1, 8, 12, 2**20])
def test_layers_in_one_piece_are_the_layers_one_by_one(together, monkeypatch):
    layers = {0: two_tokens(), 1: two_tokens(), 2: one_token(), 3: one_token(), 4: one_token()}
    stats = RoutingStats((0, 1, 2, 3, 4, 5), 4, CPU)
    monkeypatch.setattr("turnout.moe.routing.stats.TOGETHER", together)
    stats.add(layers)
    for row, layer in enumerate(stats.layers):
        alone = RoutingStats((layer,), 4, CPU)
        alone.add(layers)
        assert torch.equal(stats.tensor[row], alone.tensor[0])


def test_even_load_is_1_and_0():
    stats = RoutingStats((0,), 4, CPU)
    stats.add({0: routing([[0, 1], [2, 3]], [[True, True]] * 2, [UNDECIDED] * 2, [[0.0] * 4] * 2)})
    found = stats.fields()
    assert (found["load_max_mean"], found["load_cv"], found["dead_experts"]) == ([1.0], [0.0], [0])


def test_padding_counts_nowhere_whatever_it_holds():
    padded = routing(
        [[0, 1], [0, 2], [3, 3]], [[True, True], [False, True], [True, True]],
        [UNDECIDED, SURE, [math.nan] * 4], [[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [math.inf] * 4],
        wanted=[[True, True], [True, True], [False, False]],
    )  # fmt: skip
    bare, masked = RoutingStats((0,), 4, CPU), RoutingStats((0,), 4, CPU)
    bare.add({0: two_tokens()})
    masked.add({0: padded}, torch.tensor([True, True, False]))
    assert masked.fields() == bare.fields()


def test_nothing_routed_is_all_zero_and_every_expert_dead():
    ids_TK = torch.zeros(0, 1, dtype=torch.int64)
    nothing = Routing(
        ids_TK=ids_TK, weights_TK=ids_TK.float(), wanted_TK=ids_TK.bool(), kept_TK=ids_TK.bool(),
        logits_TE=torch.zeros(0, 4),
    )  # fmt: skip
    stats = RoutingStats((0,), 4, CPU)
    fresh = stats.fields()
    stats.add({0: nothing})
    assert stats.fields() == fresh
    assert fresh.pop("expert_load") == [[0.0] * 4]
    assert (fresh.pop("dead_experts"), fresh.pop("moe_layers"), fresh.pop("drop_fraction")) == ([4], [0], 0.0)
    assert set(map(str, fresh.values())) == {"[0.0]"}


def test_a_model_without_experts_has_empty_fields():
    found = RoutingStats((), 0, CPU).fields()
    assert found.pop("drop_fraction") == 0.0
    assert set(map(str, found.values())) == {"[]"}


def test_clear_begins_anew_and_a_snapshot_stays_as_it_was():
    stats = RoutingStats((0,), 4, CPU)
    stats.add({0: two_tokens()})
    before, fields = stats.snapshot(), stats.fields()
    stats.clear()
    assert stats.tensor.count_nonzero() == 0
    assert before.fields() == fields


def test_what_was_routed_in_inference_mode_is_counted_inside_and_outside_of_it():
    stats, inside = RoutingStats((0,), 4, CPU), RoutingStats((0,), 4, CPU)
    with torch.inference_mode():
        routed = two_tokens()
        inside.add({0: routed})
        inside.clear()
        inside.add({0: routed})
    stats.add({0: routed})
    inside.add({0: one_token()})
    stats.add({0: one_token()})
    assert inside.fields() == stats.fields()


def test_adding_never_waits_for_the_device():
    """Tensors without data stand for those of a device that is still computing: reading one would raise."""
    far = torch.device("meta")
    routed, stats = two_tokens(), RoutingStats((0,), 4, far)
    tensors = {name: value.to(far) for name, value in vars(routed).items() if isinstance(value, torch.Tensor)}
    stats.add({0: Routing(**tensors)})
    stats.add({0: Routing(**tensors)}, torch.ones(2, dtype=torch.bool, device=far))
    with pytest.raises(RuntimeError):
        stats.fields()


def one_rank_s_share(parts):
    stats = RoutingStats((1, 3), 4, CPU)
    for part in range(process.rank(), parts, process.world()):
        stats.add({1: (two_tokens, one_token)[part % 2](), 3: one_token()})
    return stats.fields(process.all_sum(stats.tensor))


def test_ranks_and_batches_add_up_to_the_same_fields():
    whole = one_rank_s_share(6)
    assert run_ranks(one_rank_s_share, 2, 6) == [whole, whole]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_measured_alike(name, training):
    torch.manual_seed(0)
    cfg = MoEConfig(width=8, expert_width=8, num_experts=4, router=name, capacity_factor=1.0, min_capacity=1)
    router = build_router(cfg, layer=2).train(training)
    tokens, valid_T = 24, torch.arange(24) < 20
    context = RouteContext(valid_T=valid_T, token_ids_T=torch.arange(tokens) * 7)
    routed = router(torch.randn(tokens, 8), context)
    stats = RoutingStats((2,), 4, CPU)
    stats.add({2: routed}, valid_T)
    found = stats.fields()
    slots = 20 * routed.ids_TK.shape[1]
    wanted, kept = int(routed.wanted_TK.sum()), int(routed.kept_TK.sum())
    assert sum(found["expert_load"][0]) == pytest.approx(1)
    assert stats.snapshot().counts() == [routed.counts_E.tolist()]
    assert found["drop_fraction"] == pytest.approx((wanted - kept) / slots)
    assert 0 <= found["router_entropy"][0] <= math.log(4) + 1e-6
    assert math.isfinite(found["router_logit_norm"][0])
    if name in ("dense", "expert_choice"):
        assert found["expert_load"] == [[0.25] * 4]
        assert found["drop_fraction"] == 0
    if name == "hash":
        assert found["router_logit_norm"] == [0.0]
