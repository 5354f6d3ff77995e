"""Layers with some of their experts."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.moe import MoE, RouteContext
from turnout.moe.compress.experts import fewer, fewer_experts, highest, keep_experts, prune_experts, score
from turnout.moe.compress.routed import Routed, expert_output, noting
from turnout.moe.config import MoEConfig
from turnout.tests.helpers.decoders import VOCABULARY, logits, make_config, make_model
from turnout.tests.moe.layers.making import LEARNED, NAMES, WIDTH, context, make

TOKENS = 40


def seen(moe: MoE) -> Routed:
    """What the layer makes of some random rows."""
    with noting(moe) as parts:
        run(moe)
    return Routed.joined(parts)


@torch.no_grad()
def run(moe: MoE) -> torch.Tensor:
    x_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return moe.eval()(x_TD, context(TOKENS, dropless=True))[0]


@pytest.mark.parametrize("router", NAMES)
def test_all_experts_are_the_layer_itself_to_the_bit(router):
    moe = make(router)
    same = keep_experts(moe, torch.arange(4))
    assert same.cfg == moe.cfg
    assert torch.equal(run(same), run(moe))


@pytest.mark.parametrize("router", [name for name in LEARNED if name not in ("gshard", "expert_choice")])
def test_what_is_left_is_the_layer_whose_router_knows_the_kept_experts_alone(router):
    """Each token's output, by hand: the old experts' outputs, weighed by the router over its kept rows."""
    moe, kept = make(router, 6, top_k={"switch": 1, "dense": 6}.get(router, 2)).eval(), torch.tensor([0, 2, 5])
    small = keep_experts(moe, kept)
    x_TD = torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        y_TD, routing = small(x_TD, context(TOKENS, dropless=True))
        every_ETD = torch.stack([expert_output(moe, expert, x_TD) for expert in range(6)])
    assert torch.allclose(routing.logits_TE, moe.router.logits(x_TD)[:, kept], atol=1e-6)
    chosen_TKD = every_ETD[kept[routing.ids_TK], torch.arange(TOKENS)[:, None]]
    by_hand_TD = (routing.weights_TK[..., None] * chosen_TKD).sum(1)
    assert torch.allclose(y_TD, by_hand_TD, atol=1e-5)
    for name, tensor in moe.router.state_dict().items():
        assert torch.equal(small.router.state_dict()[name], tensor[kept])


def test_the_least_used_go_first_by_load_by_gates_and_by_what_their_outputs_move():
    moe = make("topk_softmax", 4, top_k=2)
    routed = seen(moe)
    kept_TK = routed.gates_TK != 0
    for expert in range(4):
        mine_TK = (routed.ids_TK == expert) & kept_TK
        assert routed.load_E[expert] == mine_TK.sum()
        assert routed.gate_E[expert].item() == pytest.approx(float(routed.gates_TK[mine_TK].sum()), rel=1e-6)
        without = deepcopy(moe)
        with torch.no_grad():
            without.experts.w_out[expert] = 0
        moved = float((run(moe) - run(without)).double().square().sum())
        assert float(score(moe, routed, "output")[expert]) == pytest.approx(moved, rel=1e-4)
    assert score(moe, routed, "load").equal(routed.load_E)
    assert score(moe, routed, "gate").equal(routed.gate_E)
    assert highest(torch.tensor([3.0, 1.0, 3.0, 2.0]), moe.cfg, 2).tolist() == [0, 2]
    assert highest(torch.ones(4), moe.cfg, 3).tolist() == [0, 1, 2]


def test_an_expert_without_tokens_goes_first_and_is_named():
    model = make_model({"every": 1, "router": "gpt_oss"}, layers=1)
    block = model.blocks[0]
    with torch.no_grad():
        block.ffn.router.bias[2] = -1e9
    with noting(block.ffn) as parts:
        before = logits(model)
    notes = prune_experts(block, 3, Routed.joined(parts))
    assert notes == {"kept": [0, 1, 3], "load_kept": 1.0, "unseen": [2]}
    assert torch.allclose(logits(model), before, atol=1e-5)  # nobody asked it


def test_each_group_of_the_router_keeps_as_many():
    moe = make("deepseek_v3", 8, top_k=2, expert_groups=2, top_groups=1)
    kept = highest(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), moe.cfg, 4)
    assert kept.tolist() == [0, 1, 4, 5]
    small = keep_experts(moe, kept)
    assert small.router.balance_bias.equal(moe.router.balance_bias[kept])
    assert run(small).isfinite().all()
    with pytest.raises(ConfigError, match=r"num_experts \(5\) must be a multiple of moe.expert_groups \(2\): use 6"):
        fewer(moe.cfg, 5)
    with pytest.raises(ConfigError, match=r"num_experts \(2\) must lie in 4 to 8"):  # a group is judged by its best two
        fewer(moe.cfg, 2)


def test_one_expert_takes_every_token():
    moe = make("switch")
    alone = keep_experts(moe, torch.tensor([2]))
    x_TD = torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        assert torch.allclose(alone.eval()(x_TD)[0], expert_output(moe, 2, x_TD), atol=1e-6)


def test_what_is_impossible_where_every_expert_is_chosen_goes():
    base = {"width": 8, "expert_width": 8, "num_experts": 4, "top_k": 2}
    assert fewer(MoEConfig(**base, router="noisy_topk"), 2).load_loss == 0
    assert fewer(MoEConfig(**base, router="noisy_topk"), 3).load_loss > 0
    assert fewer(MoEConfig(**base, router="topk_softmax", reroute=2), 3).reroute == 1
    assert fewer(MoEConfig(**base | {"top_k": 4}, router="dense"), 3).top_k == 3


def test_errors_name_what_does_not_fit():
    cfg = make("gshard").cfg
    for experts in (1, 5, 0):
        rule = rf"num_experts \({experts}\) must lie in 2 to 4 where a token has moe.top_k \(2\)"
        with pytest.raises(ConfigError, match=rule):
            fewer(cfg, experts)
    with pytest.raises(ConfigError, match=r"num_experts \(3\) must be a multiple of moe.device_groups \(2\)"):
        fewer(replace(cfg, device_groups=2), 3)
    with pytest.raises(ConfigError, match=r"moe.router \(hash\) has no rows"):
        keep_experts(make("hash"), torch.arange(2))
    with pytest.raises(ConfigError, match=r"model.moe \(None\) is dense"):
        fewer_experts(make_config(None), 2)
    with pytest.raises(ConfigError, match=r"calibration \(0 tokens\) must show the experts some text"):
        Routed.joined([])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value):
    moe = make("switch")
    with torch.no_grad():
        moe.experts.w_out[1, 2, 3] = value
    with pytest.raises(NonFiniteError, match=r"experts.w_out of layer 0 must be numbers"):
        keep_experts(moe, torch.arange(2))


def test_rows_of_calibration_that_are_no_numbers_are_named():
    moe = make("switch")
    with noting(moe) as parts, torch.no_grad():
        moe(torch.randn(TOKENS, WIDTH))
    parts[0].rows_TD[2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"rows_TD of experts in calibration must be numbers"):
        Routed.joined(parts)


def test_padding_is_not_noted_and_a_dropped_choice_counts_for_nobody():
    moe = make("switch", eval_capacity_factor=0.5, min_capacity=0).eval()
    valid_T = torch.arange(TOKENS) < 30
    with noting(moe) as parts, torch.no_grad():
        routing = moe(torch.randn(TOKENS, WIDTH), RouteContext(valid_T=valid_T))[1]
    routed = Routed.joined(parts)
    assert routed.rows_TD.shape == (30, WIDTH)
    assert 0 < int(routing.kept_TK.sum()) < 30
    assert routed.load_E.sum() == routing.kept_TK.sum()


def test_a_model_keeps_as_many_in_every_sparse_block():
    model = make_model({"every": 1, "router": "topk_softmax"}, layers=2)
    cfg = fewer_experts(model.cfg, 2)
    for block in model.blocks:
        with noting(block.ffn) as parts:
            logits(model)
        prune_experts(block, 2, Routed.joined(parts))
        assert block.ffn.cfg == cfg.moe
    assert logits(model).shape == (48, VOCABULARY)
