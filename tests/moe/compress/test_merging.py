"""Layers whose experts were merged."""

import itertools

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.moe.compress import merging
from turnout.moe.compress.experts import fewer
from turnout.moe.compress.merging import clusters, distances, matching, merge_experts, merged, ward
from turnout.moe.compress.routed import Routed, expert_output, noting
from turnout.tests.helpers.decoders import logits, make_model
from turnout.tests.moe.compress.test_experts import TOKENS, WIDTH, run, seen
from turnout.tests.moe.layers.making import NAMES, make


@torch.no_grad()
def permuted(moe, expert, into):
    """Make expert `into` a copy of another whose hidden units stand in another order."""
    order_F = torch.randperm(moe.cfg.expert_width)
    own = moe.experts
    own.w_in[into] = own.w_in[expert].unflatten(0, (-1, len(order_F)))[:, order_F].flatten(0, 1)
    own.w_out[into] = own.w_out[expert][order_F]
    if own.b_in is not None:
        own.b_in[into] = own.b_in[expert].unflatten(0, (-1, len(order_F)))[:, order_F].flatten()
        own.b_out[into] = own.b_out[expert]


@pytest.mark.parametrize("router", NAMES)
def test_as_many_experts_are_the_layer_itself_to_the_bit(router):
    moe = make(router)
    same = merged(moe, clusters(moe, 4, seen(moe)), seen(moe))
    assert same.cfg == moe.cfg
    assert torch.equal(run(same), run(moe))


@pytest.mark.parametrize("router", NAMES)
def test_every_router_can_do_with_half_of_its_experts(router):
    moe = make(router, 8)
    routed = seen(moe)
    owner_E = clusters(moe, 4, routed)
    small = merged(moe, owner_E, routed)
    assert small.cfg == fewer(moe.cfg, 4)
    assert sorted(set(owner_E.tolist())) == [0, 1, 2, 3]
    assert run(small).isfinite().all()


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("relu", False), ("swiglu_clamped", True)])
def test_copies_in_another_order_are_found_and_become_what_they_were(activation, bias):
    moe = make("topk_softmax", 4, top_k=1, renormalize=False, activation=activation, bias=bias)
    permuted(moe, 0, into=3)
    permuted(moe, 1, into=2)
    routed = seen(moe)
    assert distances(moe, routed.rows_TD)[0, 3] < 1e-6
    owner_E = clusters(moe, 2, routed)
    assert owner_E.tolist() == [0, 1, 1, 0]
    small, x_TD = merged(moe, owner_E, routed), torch.randn(9, WIDTH)
    with torch.no_grad():
        for expert in (0, 1):
            assert torch.allclose(expert_output(small, expert, x_TD), expert_output(moe, expert, x_TD), atol=1e-5)


def test_the_mean_is_weighted_by_load_and_an_expert_without_tokens_leaves_no_trace():
    moe = make("gpt_oss", 4, top_k=2)
    with torch.no_grad():
        moe.router.bias[3] = -1e9
    routed = seen(moe)
    assert routed.load_E[3] == 0
    owner_E = torch.tensor([0, 1, 2, 1])
    small = merged(moe, owner_E, routed)
    assert torch.allclose(small.experts.w_in[1], moe.experts.w_in[1], atol=1e-5)
    owner_E = torch.tensor([0, 0, 1, 1])
    load_E, order = routed.load_E, matching(*(merging.units(moe, e) for e in _busy_first(routed, 0, 1)))
    busy, other = _busy_first(routed, 0, 1)
    by_hand = (load_E[busy] * moe.experts.w_out[busy] + load_E[other] * moe.experts.w_out[other][order]).float()
    found = merged(moe, owner_E, routed).experts.w_out[0]
    assert torch.allclose(found, by_hand / float(load_E[:2].sum()), atol=1e-6)


def _busy_first(routed, a, b):
    return (a, b) if routed.load_E[a] >= routed.load_E[b] else (b, a)


def test_ward_merges_what_moves_the_weighted_sum_least_at_every_step():
    torch.manual_seed(3)
    points_EX, weight_E = torch.randn(7, 3).double(), torch.rand(7).double() + 0.1
    distance_EE = torch.cdist(points_EX, points_EX).square()

    def spread(members):
        mean_X = (weight_E[members, None] * points_EX[members]).sum(0) / weight_E[members].sum()
        return float((weight_E[members] * (points_EX[members] - mean_X).square().sum(1)).sum())

    parts = [[e] for e in range(7)]
    for left in range(6, 0, -1):
        pairs = list(itertools.combinations(range(len(parts)), 2))
        cost = [spread(parts[a] + parts[b]) - spread(parts[a]) - spread(parts[b]) for a, b in pairs]
        a, b = pairs[cost.index(min(cost))]
        parts = sorted([*(part for i, part in enumerate(parts) if i not in (a, b)), sorted(parts[a] + parts[b])])
        found = ward(distance_EE, weight_E, left)
        assert [(found == c).nonzero().flatten().tolist() for c in range(left)] == parts


def test_matching_finds_a_permutation_and_takes_every_unit_once():
    torch.manual_seed(0)
    a_FU, order_F = torch.randn(40, 30), torch.randperm(40)
    assert matching(a_FU[order_F], a_FU).equal(order_F)
    for other_FU in (torch.randn(40, 30), torch.zeros(40, 30), torch.ones(40, 30)):
        assert matching(a_FU, other_FU).sort().values.equal(torch.arange(40))


def test_the_router_s_rows_come_nearer_to_the_sum_of_probabilities_than_their_mean_does():
    moe = make("switch", 6)
    routed = seen(moe)
    owner_E = clusters(moe, 3, routed)
    members = [(owner_E == c).nonzero().flatten() for c in range(3)]
    mean_CD = merging._means(list(moe.router.weight.detach()), merging._weights(routed.load_E), members)
    fit_CD = merging.router_rows(moe, mean_CD, members, routed)
    wanted_TC = torch.stack([routed.logits_TE[:, m].logsumexp(1) for m in members], 1)
    fit, mean = ((routed.rows_TD @ rows.mT - wanted_TC).square().mean() for rows in (fit_CD, mean_CD))
    assert fit < 0.8 * mean
    assert merged(moe, owner_E, routed).router.weight.equal(fit_CD)
    for cluster, member_M in enumerate(members):
        if len(member_M) == 1:
            assert fit_CD[cluster].equal(moe.router.weight[int(member_M)])


def test_a_hash_router_s_experts_are_merged_as_the_hash_puts_their_tokens_together():
    moe = make("hash")
    permuted(moe, 0, into=2)
    permuted(moe, 1, into=3)
    routed = seen(moe)
    assert clusters(moe, 2, routed).tolist() == [0, 1, 0, 1]
    small = merged(moe, clusters(moe, 2, routed), routed)
    assert torch.allclose(run(small), run(moe), atol=1e-5)
    with pytest.raises(ConfigError, match=r"num_experts \(3\) must divide moe.num_experts \(4\)"):
        clusters(moe, 3, routed)


def test_clusters_stay_within_the_groups_of_the_router():
    moe = make("deepseek_v2", 8, top_k=2, expert_groups=2, top_groups=1)
    permuted(moe, 0, into=7)  # alike, but in different groups
    owner_E = clusters(moe, 4, seen(moe))
    assert sorted(set(owner_E[:4].tolist())) == [0, 1]
    assert sorted(set(owner_E[4:].tolist())) == [2, 3]


def test_a_block_is_changed_in_place_and_says_what_became_of_its_experts():
    model = make_model({"every": 1}, layers=1)
    block = model.blocks[0]
    with noting(block.ffn) as parts:
        logits(model)
    routed = Routed.joined(parts)
    notes = merge_experts(block, 1, routed)
    assert notes == {"clusters": [[0, 1, 2, 3]], "unseen": []}
    assert block.ffn.experts.w_in.shape == (1, 32, 24)
    assert logits(model).isfinite().all()
    with pytest.raises(ConfigError, match=r"num_experts \(2\) must lie in 1 to 1"):
        merge_experts(block, 2, routed)


def test_a_weight_that_is_no_number_is_named():
    model = make_model({"every": 1}, layers=1)
    with noting(model.blocks[0].ffn) as parts:
        logits(model)
    with torch.no_grad():
        model.blocks[0].ffn.router.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"router.weight of layer 0 must be numbers"):
        merge_experts(model.blocks[0], 2, Routed.joined(parts))


def test_rows_are_compared_evenly_spaced(monkeypatch):
    moe = make("switch")
    rows_TD = torch.randn(TOKENS, WIDTH)
    monkeypatch.setattr(merging, "ROWS", 10)
    sampled = distances(moe, rows_TD)
    monkeypatch.undo()
    assert torch.allclose(sampled, distances(moe, rows_TD[::4]))
