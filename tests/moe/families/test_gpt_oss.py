"""GPT-OSS, plain and in MXFP4, against transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from turnout import CheckpointError, ConfigError
from turnout.moe import load_model
from turnout.moe.families.directory import read_foreign, save_foreign
from turnout.moe.families.mxfp4 import unpack
from turnout.tests.moe.families import parity

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7,
    "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "original_max_position_embeddings": 16}
SHAPES = {
    "as published": {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
    "all windows": {
        "num_key_value_heads": 1, "layer_types": ["sliding_attention"] * 2, "rope_parameters": YARN,
    },
    "no window": {
        "num_key_value_heads": 4, "layer_types": ["full_attention"] * 3, "num_hidden_layers": 3,
        "attention_bias": False, "num_experts_per_tok": 4, "hidden_size": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "shape", [pytest.param(SHAPES[n], id=n, marks=() if n == "as published" else pytest.mark.full) for n in SHAPES]
)
def test_parity(shape, tmp_path):
    parity.check(GptOssForCausalLM, GptOssConfig(**(SIZES | shape)), tmp_path)


@pytest.fixture
def published(tmp_path):
    """A small model as OpenAI's are: experts in MXFP4, everything else in bfloat16."""
    config = GptOssConfig(**(SIZES | SHAPES["as published"]))
    model = parity.randomise(GptOssForCausalLM._from_config(config)).bfloat16()
    model.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, features, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, features // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, (experts, out, features // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, file, metadata={"format": "pt"})
    data = json.loads((tmp_path / "packed" / "config.json").read_text())
    data |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(data))
    return tmp_path / "packed", tensors


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(published, tmp_path):
    directory, tensors = published
    found, ours = read_foreign(directory), load_model(directory)
    assert found.unknown == ()
    save_foreign(tmp_path / "plain", ours.cfg, ours.state_dict(), "gpt_oss", dtype="bfloat16", origin=found.data)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            assert torch.equal(plain[name.removesuffix("_blocks")], convert_moe_packed_tensors(tensor, scales))
        elif not name.endswith("_scales"):
            assert torch.equal(plain[name], tensor)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    theirs = GptOssForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, attn_implementation="eager")
    parity.check_logits(theirs, load_model(directory, dtype="float32"))


@pytest.mark.full
@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 253])
def test_every_byte_under_every_kind_of_scale(scale):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 2, 8, 16)
    scales = torch.full((1, 2, 8), scale, dtype=torch.uint8)
    assert torch.equal(unpack(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(name + "_scales"), "scales is missing"),
        (lambda t, name: t.update({name + "_scales": t[name + "_scales"][:, :5]}), r"must be \[\.\.\., 16\]"),
        (lambda t, name: t.update({name + "_blocks": t[name + "_blocks"].short()}), "must be U8"),
    ],
)
def test_half_a_pair_is_refused(published, change, message):
    directory, tensors = published
    change(tensors, "model.layers.0.mlp.experts.down_proj")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("swiglu_limit", 6.0),
        ("swiglu_alpha", 1.5),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "awq"}),
    ],
)
def test_what_is_computed_otherwise_is_refused(tmp_path, key, value):
    GptOssConfig(**(SIZES | SHAPES["as published"])).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=key):
        read_foreign(tmp_path)
