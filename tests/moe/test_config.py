"""Configurations are refused at birth, naming the field, the value, the rule and the fix."""

from typing import get_args

import pytest

from turnout import ConfigError
from turnout.configs.typed import build, to_dict
from turnout.moe import ModelConfig, MoEConfig
from turnout.moe.config import BASE, PAPER, AttentionConfig, EncoderConfig, RouterName

MOE = {"width": 16, "expert_width": 8}
MODEL = {
    "vocab_size": 10, "width": 16, "layers": 4, "heads": 6, "kv_heads": 2,
    "head_dim": 4, "ffn_width": 8, "max_seq_len": 32,
}  # fmt: skip


REFUSED = [
    ({"num_experts": 0}, "moe.num_experts (0) must be at least 1: use moe.num_experts=1 or more"),
    ({"top_k": 0}, "moe.top_k (0) must be at least 1: use moe.top_k=1 or more"),
    ({"top_k": 2}, "moe.top_k (2) must be 1 for moe.router=switch: use moe.top_k=1 or another router"),
    (
        {"router": "gshard", "top_k": 1},
        "moe.top_k (1) must be 2 for moe.router=gshard: use moe.top_k=2 or another router",
    ),
    (
        {"router": "gshard", "top_k": 2, "num_experts": 1},
        "moe.top_k (2) can not exceed moe.num_experts (1): lower it or add experts",
    ),
    (
        {"router": "dense", "top_k": 2},
        "moe.top_k (2) must be 8 for moe.router=dense: use moe.top_k=8 or another router",
    ),
    ({"router": "hash", "top_k": 2}, "moe.top_k (2) must be 1 for moe.router=hash: use moe.top_k=1 or another router"),
    ({"router": "softmax", "top_k": 9}, "moe.top_k (9) can not exceed moe.num_experts (8): lower it or add experts"),
    (
        {"router": "topk_softmax", "top_k": 1},
        "moe.top_k (1) gives every token the weight 1 under moe.router=topk_softmax, so the router would learn "
        "nothing: use moe.top_k=2, moe.renormalize=false or moe.router=switch",
    ),
    (
        {"router": "noisy_topk", "top_k": 1},
        "moe.top_k (1) gives every token the weight 1 under moe.router=noisy_topk, so the router would learn "
        "nothing: use moe.top_k=2 or moe.router=switch",
    ),
    (
        {"router": "gpt_oss", "top_k": 1},
        "moe.top_k (1) gives every token the weight 1 under moe.router=gpt_oss, so the router would learn nothing:"
        " use moe.top_k=2 or moe.router=switch",
    ),
    (
        {"router": "deepseek_v3", "top_k": 1},
        "moe.top_k (1) gives every token the weight 1 under moe.router=deepseek_v3, so the router would learn "
        "nothing: use moe.top_k=2, moe.renormalize=false or moe.router=switch",
    ),
    (
        {"router": "deepseek_v2", "top_k": 1, "renormalize": True},
        "moe.top_k (1) gives every token the weight 1 under moe.router=deepseek_v2, so the router would learn "
        "nothing: use moe.top_k=2, moe.renormalize=false or moe.router=switch",
    ),
    (
        {"renormalize": True},
        "moe.renormalize (True) is not read by moe.router=switch: leave it out, or use moe.router=topk_softmax",
    ),
    (
        {"renormalize_kept": True},
        "moe.renormalize_kept (True) is not read by moe.router=switch: leave it out, or use moe.router=gshard",
    ),
    (
        {"second_policy": "all"},
        "moe.second_policy (all) is not read by moe.router=switch: leave it out, or use moe.router=gshard",
    ),
    (
        {"second_threshold": 0.2},
        "moe.second_threshold (0.2) is not read by moe.router=switch: leave it out, or use moe.router=gshard",
    ),
    (
        {"expert_groups": 2},
        "moe.expert_groups (2) is not read by moe.router=switch: leave it out, or use moe.router=deepseek_v2",
    ),
    (
        {"top_groups": 2},
        "moe.top_groups (2) is not read by moe.router=switch: leave it out, or use moe.router=deepseek_v2",
    ),
    (
        {"route_scale": 2.0},
        "moe.route_scale (2.0) is not read by moe.router=switch: leave it out, or use moe.router=deepseek_v2",
    ),
    (
        {"bias_rate": 0.1},
        "moe.bias_rate (0.1) is not read by moe.router=switch: leave it out, or use moe.router=deepseek_v3",
    ),
    (
        {"load_loss": 0.1},
        "moe.load_loss (0.1) is not read by moe.router=switch: leave it out, or use moe.router=noisy_topk",
    ),
    (
        {"router": "gshard", "second_threshold": 0.0},
        "moe.second_threshold (0.0) must lie in (0, 1]: use 0.5 (GShard) or 0.2 (Mesh TensorFlow)",
    ),
    (
        {"router": "gshard", "second_threshold": 1.5},
        "moe.second_threshold (1.5) must lie in (0, 1]: use 0.5 (GShard) or 0.2 (Mesh TensorFlow)",
    ),
    (
        {"router": "deepseek_v2", "route_scale": 0.0},
        "moe.route_scale (0.0) must be positive: use 1.0, or 2.5 (DeepSeek-V3)",
    ),
    (
        {"router": "deepseek_v2", "expert_groups": 3},
        "moe.expert_groups (3) must divide moe.num_experts (8): use 1, 2, 4 or 8",
    ),
    (
        {"router": "deepseek_v2", "expert_groups": 0},
        "moe.expert_groups (0) must be at least 1: use moe.expert_groups=1 or more",
    ),
    (
        {"router": "deepseek_v2", "expert_groups": 4, "top_groups": 5},
        "moe.top_groups (5) must lie in 1 to moe.expert_groups (4): lower it",
    ),
    (
        {"router": "deepseek_v2", "expert_groups": 4, "top_groups": 0},
        "moe.top_groups (0) must lie in 1 to moe.expert_groups (4): lower it",
    ),
    (
        {"router": "deepseek_v2", "expert_groups": 4, "top_groups": 1, "top_k": 3},
        "moe.top_k (3) can not exceed the 2 experts of the moe.top_groups (1) groups that a token may use: raise "
        "moe.top_groups or lower moe.top_k",
    ),
    (
        {"router": "deepseek_v3", "expert_groups": 8, "top_groups": 4},
        "moe.expert_groups (8) leaves groups of one expert, but moe.router=deepseek_v3 scores a group by its best "
        "two: use fewer groups",
    ),
    ({"device_groups": 3}, "moe.device_groups (3) must divide moe.num_experts (8): use 1, 2, 4 or 8"),
    (
        {"device_loss": 0.1},
        "moe.device_loss (0.1) needs moe.device_groups of at least 2: use moe.device_groups=4, or moe.device_loss=0",
    ),
    ({"capacity_factor": 0.0}, "moe.capacity_factor (0.0) must be positive: use 1.25, or null for dropless"),
    ({"capacity_factor": float("nan")}, "moe.capacity_factor (nan) must be positive: use 1.25, or null for dropless"),
    (
        {"eval_capacity_factor": float("inf")},
        "moe.eval_capacity_factor (inf) must be positive: use 1.25, or null for dropless",
    ),
    (
        {"router": "expert_choice", "capacity_factor": None},
        "moe.capacity_factor (None) must be set for moe.router=expert_choice: an expert takes moe.top_k · factor ·"
        " tokens / experts: use 1.0",
    ),
    (
        {"router": "expert_choice", "eval_capacity_factor": None},
        "moe.eval_capacity_factor (None) must be set for moe.router=expert_choice: an expert takes moe.top_k · "
        "factor · tokens / experts: use 1.0",
    ),
    ({"capacity_tokens": 0}, "moe.capacity_tokens (0) must be at least 1: use the training row length"),
    ({"min_capacity": -1}, "moe.min_capacity (-1) must be at least 0: use moe.min_capacity=0 or more"),
    ({"reroute": -1}, "moe.reroute (-1) must be at least 0: use moe.reroute=0 or more"),
    (
        {"reroute": 8},
        "moe.reroute (8) can not exceed the 7 experts that a token has not asked: use moe.reroute=7 or less",
    ),
    (
        {"reroute": 2, "capacity_factor": None},
        "moe.reroute (2) retries dropped assignments, and moe.capacity_factor=null drops none: use moe.reroute=0",
    ),
    (
        {"router": "expert_choice", "reroute": 2},
        "moe.reroute (2) retries dropped assignments, and moe.router=expert_choice drops none: use moe.reroute=0",
    ),
    (
        {"router": "dense", "reroute": 1},
        "moe.reroute (1) retries dropped assignments, and moe.router=dense drops none: use moe.reroute=0",
    ),
    ({"balance_loss": -0.1}, "moe.balance_loss (-0.1) must be zero or positive: use 0 to switch it off"),
    ({"sequence_loss": -1.0}, "moe.sequence_loss (-1.0) must be zero or positive: use 0 to switch it off"),
    ({"z_loss": float("nan")}, "moe.z_loss (nan) must be zero or positive: use 0 to switch it off"),
    (
        {"router": "deepseek_v3", "bias_rate": -1.0},
        "moe.bias_rate (-1.0) must be zero or positive: use 0 to switch it off",
    ),
    (
        {"router": "dense", "balance_loss": 0.1},
        "moe.balance_loss (0.1) has no place beside moe.router=dense: every expert takes every token: use "
        "moe.balance_loss=0 or another router",
    ),
    (
        {"router": "sinkhorn", "importance_loss": 0.1},
        "moe.importance_loss (0.1) has no place beside moe.router=sinkhorn: its assignment is balanced by "
        "construction: use moe.importance_loss=0 or another router",
    ),
    (
        {"router": "expert_choice", "sequence_loss": 0.1},
        "moe.sequence_loss (0.1) has no place beside moe.router=expert_choice: every expert takes its share of "
        "tokens: use moe.sequence_loss=0 or another router",
    ),
    (
        {"router": "hash", "global_batch_loss": 0.1},
        "moe.global_batch_loss (0.1) has no place beside moe.router=hash: its assignment is fixed: use "
        "moe.global_batch_loss=0 or another router",
    ),
    (
        {"router": "hash", "z_loss": 0.1},
        "moe.z_loss (0.1) needs router logits, which moe.router=hash does not have: use moe.z_loss=0",
    ),
    (
        {"router": "hash", "jitter": 0.1},
        "moe.jitter (0.1) scales the router's input, which moe.router=hash does not have: use moe.jitter=0",
    ),
    (
        {"router": "noisy_topk", "top_k": 8},
        "moe.load_loss (0.1) is undefined for moe.top_k = moe.num_experts (8): use moe.load_loss=0 or a smaller "
        "moe.top_k",
    ),
    ({"jitter": 1.0}, "moe.jitter (1.0) must lie in [0, 1): use 0.01 (Switch) or 0"),
    ({"jitter": -0.1}, "moe.jitter (-0.1) must lie in [0, 1): use 0.01 (Switch) or 0"),
    ({"expert_dropout": 1.0}, "moe.expert_dropout (1.0) must lie in [0, 1): use 0.4 (Switch, fine-tuning) or 0"),
    (
        {"shared_width": 0, "shared_experts": 1},
        "moe.shared_width (0) must be at least 1: use moe.shared_width=1 or more",
    ),
    ({"shared_width": 8}, "moe.shared_width (8) needs moe.shared_experts of at least 1: use moe.shared_experts=1"),
    ({"shared_gate": True}, "moe.shared_gate (True) needs moe.shared_experts of at least 1: use moe.shared_experts=1"),
    ({"shared_experts": -1}, "moe.shared_experts (-1) must be at least 0: use moe.shared_experts=0 or more"),
    ({"init_scale": -1.0}, "moe.init_scale (-1.0) must be zero or positive: use 0.1 (Switch) or 1.0"),
    ({"every": 0}, "moe.every (0) must be at least 1: use moe.every=1 or more"),
    ({"first_dense": -1}, "moe.first_dense (-1) must be at least 0: use moe.first_dense=0 or more"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_moe_layer_that_can_not_work_is_refused_by_field_value_rule_and_fix(change, message):
    with pytest.raises(ConfigError) as error:
        MoEConfig(**MOE | change)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, r"model\.layers \(0\) must be at least 1"),
        ({"kv_heads": 4}, r"model\.kv_heads \(4\) must divide model\.heads \(6\): use 1, 2, 3 or 6"),
        ({"head_dim": 5}, r"model\.head_dim \(5\) must be even"),
        ({"eos_token_id": 10}, r"model\.eos_token_id \(10\) must lie in the vocabulary \(0 to 9\)"),
        ({"rope_theta": 0.0}, r"model\.rope_theta \(0\.0\)"),
        ({"norm_eps": 0.0}, r"model\.norm_eps \(0\.0\)"),
        ({"moe": MoEConfig(width=8, expert_width=8)}, r"moe\.width \(8\) must equal model\.width \(16\)"),
        (
            {"moe": MoEConfig(**MOE, router="expert_choice")},
            r"moe\.router \(expert_choice\) lets a token's experts depend on later tokens.*moe\.noncausal=true",
        ),
        (
            {"moe": MoEConfig(**MOE, every=2, first_dense=4)},
            r"moe\.every \(2\) and moe\.first_dense \(4\) leave no MoE block in model\.layers \(4\): lower them",
        ),
        (
            {"moe": MoEConfig(**MOE, every=5)},
            r"moe\.every \(5\) and moe\.first_dense \(0\) leave no MoE block in model\.layers \(4\)",
        ),
    ],
)
def test_a_model_that_can_not_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**MODEL | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 0.0}, r"model\.attention\.clip \(0\.0\) must be positive: use null"),
        ({"window": 0}, r"model\.attention\.window \(0\) must be positive"),
        ({"window_layers": (1,)}, r"model\.attention\.window_layers .* needs model\.attention\.window"),
        ({"window": 3, "window_layers": (4,)}, r"window_layers \(4\) must lie below model\.layers \(4\)"),
        ({"buckets": 6}, r"model\.attention\.buckets \(6\) must be a multiple of 4"),
        ({"buckets": 32, "max_distance": 16}, r"half of it below model\.attention\.max_distance"),
    ],
)
def test_attention_that_can_not_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**MODEL | {"attention": AttentionConfig(**change)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": AttentionConfig(qk_norm="width")}, r"attention\.qk_norm \(width\) normalises over all heads"),
        (
            {"attention": AttentionConfig(positions="relative")},
            r"attention\.positions \(relative\) has biases that all",
        ),
        ({"encoder": EncoderConfig(layers=1)}, r"model\.encoder \(set\) attends to tokens that parallel\.tp \(2\)"),
    ],
)
def test_attention_that_can_not_be_divided_is_refused_with_the_reason(change, message):
    cfg = ModelConfig(**MODEL | {"ffn_width": 32, "kv_heads": 2} | change)
    cfg.check_parts(1)
    with pytest.raises(ConfigError, match=message):
        cfg.check_parts(2)
    divisible = AttentionConfig(qk_norm="head", clip=1.0, sinks=True, window=4, qkv_bias=True, output_bias=True)
    ModelConfig(**MODEL | {"ffn_width": 32, "kv_heads": 2, "attention": divisible}).check_parts(2)


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ("dense", {"top_k": 8, "balance_loss": 0.0, "z_loss": 0.0}),
        ("softmax", {"top_k": 2, "balance_loss": 1e-2, "z_loss": 1e-3}),
        ("noisy_topk", {"top_k": 2, "balance_loss": 0.0, "importance_loss": 0.1, "load_loss": 0.1, "z_loss": 0.0}),
        ("gshard", {"top_k": 2, "balance_loss": 1e-2, "second_policy": "random"}),
        ("switch", {"top_k": 1, "balance_loss": 1e-2, "renormalize": False}),
        ("topk_softmax", {"top_k": 2, "renormalize": True}),
        ("gpt_oss", {"top_k": 2}),
        ("deepseek_v2", {"top_k": 2, "renormalize": False, "bias_rate": 0.0}),
        (
            "deepseek_v3",
            {"top_k": 2, "renormalize": True, "balance_loss": 0.0, "sequence_loss": 1e-4, "bias_rate": 1e-3},
        ),
        ("expert_choice", {"top_k": 2, "balance_loss": 0.0}),
        ("sinkhorn", {"top_k": 1, "balance_loss": 0.0, "z_loss": 0.0}),
        ("hash", {"top_k": 1, "balance_loss": 0.0, "z_loss": 0.0}),
    ],
)
def test_what_is_left_null_follows_the_router_s_paper(router, expected):
    for nulls in ({}, dict.fromkeys(BASE)):
        cfg = MoEConfig(**MOE, router=router, **nulls)
        assert {name: getattr(cfg, name) for name in expected} == expected
        assert None not in {getattr(cfg, name) for name in BASE}
        assert build(MoEConfig, to_dict(cfg)) == cfg, "what was resolved is what is written"


def test_every_router_has_its_paper_and_top_k_never_exceeds_the_experts():
    assert set(PAPER) == set(get_args(RouterName))
    assert MoEConfig(**MOE, router="topk_softmax", num_experts=1).top_k == 1


def test_a_value_wins_over_the_paper_and_zero_is_a_value():
    cfg = MoEConfig(**MOE, router="deepseek_v3", bias_rate=0.0, renormalize=False, sequence_loss=0.0, balance_loss=0.5)
    assert (cfg.bias_rate, cfg.renormalize, cfg.sequence_loss, cfg.balance_loss) == (0.0, False, 0.0, 0.5)


def test_the_losses_are_those_that_are_on_and_two_measures():
    assert MoEConfig(**MOE).losses == {"balance": 1e-2, "z": 1e-3}
    assert MoEConfig(**MOE, router="noisy_topk").losses == {"balance": 0, "importance": 0.1, "load": 0.1, "z": 0}
    cfg = MoEConfig(**MOE, router="deepseek_v2", device_loss=0.05, device_groups=4, global_batch_loss=0.3, z_loss=0.0)
    assert cfg.losses == {"balance": 1e-2, "global_batch": 0.3, "device": 0.05, "z": 0.0}
    assert MoEConfig(**MOE, router="hash").losses == {}


@pytest.mark.parametrize(("first_dense", "layers"), [(0, (1, 3)), (1, (1, 3)), (2, (3,))])
def test_the_first_blocks_may_be_dense_in_any_case(first_dense, layers):
    assert ModelConfig(**MODEL, moe=MoEConfig(**MOE, every=2, first_dense=first_dense)).moe_layers == layers


def test_a_decoder_takes_expert_choice_when_it_is_forced():
    moe = MoEConfig(**MOE, router="expert_choice", noncausal=True)
    assert ModelConfig(**MODEL, moe=moe).moe_layers == (1, 3)


@pytest.mark.parametrize(("every", "layers"), [(1, (0, 1, 2, 3)), (2, (1, 3)), (3, (2,)), (4, (3,))])
def test_the_last_of_every_few_blocks_is_sparse(every, layers):
    assert ModelConfig(**MODEL, moe=MoEConfig(**MOE, every=every)).moe_layers == layers


def test_a_dense_model_has_no_sparse_blocks():
    assert ModelConfig(**MODEL).moe_layers == ()
