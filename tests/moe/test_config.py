"""Configurations are refused at birth, naming the field, the value, the rule and the fix."""

import pytest

from turnout import ConfigError
from turnout.moe import ModelConfig, MoEConfig

MOE = {"width": 16, "expert_width": 8}
MODEL = {
    "vocab_size": 10, "width": 16, "layers": 4, "heads": 6, "kv_heads": 2,
    "head_dim": 4, "ffn_width": 8, "max_seq_len": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, r"moe\.num_experts \(0\) must be at least 1"),
        ({"top_k": 2}, r"moe\.top_k \(2\) must be 1 for moe\.router=switch: use moe\.top_k=1"),
        ({"router": "gshard"}, r"moe\.top_k \(1\) must be 2 for moe\.router=gshard: use moe\.top_k=2"),
        ({"router": "gshard", "top_k": 2, "num_experts": 1}, r"moe\.top_k \(2\) can not exceed moe\.num_experts \(1\)"),
        ({"capacity_factor": 0.0}, r"moe\.capacity_factor \(0\.0\) must be positive: .*null for dropless"),
        ({"capacity_factor": float("nan")}, r"moe\.capacity_factor \(nan\)"),
        ({"eval_capacity_factor": float("inf")}, r"moe\.eval_capacity_factor \(inf\)"),
        ({"capacity_tokens": 0}, r"moe\.capacity_tokens \(0\)"),
        ({"min_capacity": -1}, r"moe\.min_capacity \(-1\) must be at least 0"),
        ({"balance_loss": -0.1}, r"moe\.balance_loss \(-0\.1\)"),
        ({"z_loss": float("nan")}, r"moe\.z_loss \(nan\)"),
        ({"jitter": 1.0}, r"moe\.jitter \(1\.0\) must lie in \[0, 1\)"),
        ({"every": 0}, r"moe\.every \(0\)"),
    ],
)
def test_a_moe_layer_that_can_not_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**MOE | change)


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
        ({"moe": MoEConfig(**MOE, every=5)}, r"moe\.every \(5\) leaves no MoE block in model\.layers \(4\)"),
    ],
)
def test_a_model_that_can_not_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**MODEL | change)


@pytest.mark.parametrize(("every", "layers"), [(1, (0, 1, 2, 3)), (2, (1, 3)), (3, (2,)), (4, (3,))])
def test_the_last_of_every_few_blocks_is_sparse(every, layers):
    assert ModelConfig(**MODEL, moe=MoEConfig(**MOE, every=every)).moe_layers == layers


def test_a_dense_model_has_no_sparse_blocks():
    assert ModelConfig(**MODEL).moe_layers == ()
