"""DeepSeek-V2 and V3 compute here what they do in transformers, and go out as they came."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from turnout import CheckpointError, ConfigError
from turnout.moe import load_model
from turnout.moe.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from turnout.moe.families.directory import read_foreign, save_foreign
from turnout.moe.families.keys import Keys
from turnout.moe.families.place import paired
from turnout.tests.moe.families import parity

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 96, "kv_lora_rank": 8,
    "q_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
}  # fmt: skip
PEERS = {"v2": (DeepseekV2Config, DeepseekV2ForCausalLM), "v3": (DeepseekV3Config, DeepseekV3ForCausalLM)}
UNLIMITED = {"n_group": 1, "topk_group": 1}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 6.0, "original_max_position_embeddings": 16}
FULL = pytest.mark.full
NO_SHARED = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # theirs builds them with no width

V2 = [
    pytest.param({"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}, id="groups"),
    pytest.param(
        {**UNLIMITED, "q_lora_rank": None, "tie_word_embeddings": True, "n_shared_experts": 0,
         "rope_parameters": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.707}},
        id="lite, tied, no shared experts, yarn", marks=NO_SHARED,
    ),
    pytest.param({"attention_bias": True, "num_attention_heads": 2, "num_key_value_heads": 2,
                  "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
                  "rope_parameters": YARN}, id="biases, plain yarn", marks=FULL),
    pytest.param({"first_k_dense_replace": 3, "q_lora_rank": None, "v_head_dim": 10}, id="dense", marks=FULL),
    pytest.param({"topk_method": "greedy", "first_k_dense_replace": 0, "num_experts_per_tok": 5}, id="5", marks=FULL),
]  # fmt: skip
V3 = [
    pytest.param({}, id="groups"),
    pytest.param(
        {"rope_interleave": False, "attention_bias": True, "n_shared_experts": 2, "norm_topk_prob": False,
         "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        id="halves, biases, yarn",
    ),
    pytest.param({**UNLIMITED, "q_lora_rank": None, "tie_word_embeddings": True, "n_shared_experts": 0},
                 id="moonlight, tied, no shared experts", marks=[FULL, NO_SHARED]),
    pytest.param({"first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 4,
                  "eos_token_id": [1, 7], "rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0}},
                 id="one group, two ends", marks=FULL),
    pytest.param({"num_nextn_predict_layers": 0, "num_attention_heads": 1, "num_key_value_heads": 1,
                  "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
                 id="one head, linear", marks=FULL),
]  # fmt: skip


def theirs_of(kind: str, **changes: Any) -> Any:
    """A random model of theirs."""
    config, model = PEERS[kind]
    return parity.randomise(model._from_config(config(**{**SIZES, **changes}), attn_implementation="eager"))


def check_family(kind: str, changes: dict[str, Any], tmp_path) -> None:
    config, model = PEERS[kind]
    parity.check(model, config(**{**SIZES, **changes}), tmp_path)


@pytest.mark.parametrize("changes", V2)
def test_v2_computes_what_it_does_in_transformers(changes, tmp_path):
    check_family("v2", changes, tmp_path)


@pytest.mark.parametrize("changes", V3)
def test_v3_computes_what_it_does_in_transformers(changes, tmp_path):
    check_family("v3", changes, tmp_path)


def test_in_bfloat16_the_balance_bias_stays_float32(tmp_path):
    theirs = theirs_of("v3").to(torch.bfloat16)
    for layer in theirs.model.layers[1:]:  # as their `from_pretrained` keeps it
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float() + 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    found, ours = read_foreign(tmp_path / "theirs"), load_model(tmp_path / "theirs")
    save_foreign(tmp_path / "again", ours.cfg, ours.state_dict(), "deepseek_v3", dtype="bfloat16", origin=found.data)
    parity.assert_same_tensors(tmp_path / "theirs", tmp_path / "again")
    kinds = {tensor.dtype for tensor in parity.read_tensors(tmp_path / "again").values()}
    assert kinds == {torch.bfloat16, torch.float32}


def test_tensors_of_multi_token_prediction_are_left_out(tmp_path):
    theirs = theirs_of("v3")
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {
        f"model.layers.3.{name}": torch.ones(2) for name in ("eh_proj.weight", "embed_tokens.weight", "hnorm.weight")
    }
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name])
    save_file(tensors | {"model.layers.4.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.4.norm.weight in .* has no place in a deepseek_v3"):
        load_model(tmp_path)


def test_quantized_checkpoints_are_refused(tmp_path):
    data = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"quantization_config \(fp8\) must not be there: give the model in bfloat16"):
        read_foreign(tmp_path)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        (DEEPSEEK_V2, "norm_topk_prob", True), (DEEPSEEK_V2, "topk_method", "noaux_tc"),
        (DEEPSEEK_V2, "scoring_func", "sigmoid"), (DEEPSEEK_V2, "mlp_bias", True), (DEEPSEEK_V3, "moe_layer_freq", 2),
        (DEEPSEEK_V3, "scoring_func", "softmax"), (DEEPSEEK_V3, "topk_method", "greedy"),
        (DEEPSEEK_V3, "num_key_value_heads", 1), (DEEPSEEK_V3, "num_nextn_predict_layers", 2),
        (DEEPSEEK_V3, "hidden_act", "gelu"),
    ],
)  # fmt: skip
def test_what_is_computed_otherwise_is_refused(family, key, value):
    with pytest.raises(ConfigError, match=rf"{key} \({value}\) of config.json must be"):
        family.read(Keys({**SIZES, "n_shared_experts": 1, key: value}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": {"window": 8}}, "model.attention.window"),
        ({"attention": {"scale": 0.25}}, "model.attention.scale"),
        ({"attention": {"latent": None}}, "model.attention.latent"),
        ({"activation": "gelu"}, "model.activation"),
        ({"moe": {"eval_capacity_factor": 2.0}}, "moe.eval_capacity_factor"),
        ({"moe": {"shared_gate": True}}, "moe.shared_gate"),
        ({"moe": {"shared_width": 13}}, "moe.shared"),
        ({"moe": {"router": "deepseek_v2", "sequence_loss": 0.0, "bias_rate": 0.0}}, "moe.router"),
        ({"moe": {"sparse_layers": (0, 2)}}, "can not be said in a deepseek_v3"),
    ],
)  # fmt: skip
def test_what_deepseek_is_not_can_not_go_out_as_deepseek(changes, words):
    cfg = DEEPSEEK_V3.read(Keys({**SIZES, "n_shared_experts": 1}))
    parts = {
        name: dataclasses.replace(getattr(cfg, name), **change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    with pytest.raises(ConfigError, match=words):
        DEEPSEEK_V3.to_theirs(dataclasses.replace(cfg, **parts), "float32")


def test_neighbours_become_halves_behind_what_does_not_turn():
    assert paired(2, 6, 4) == (0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11)
