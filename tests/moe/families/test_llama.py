"""Llama's directories, against transformers."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from turnout import ConfigError
from turnout.moe.families.keys import Keys
from turnout.moe.families.llama import read
from turnout.tests.moe.families import parity

SIZES = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 96,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SHAPES = {
    "odd": {},
    "tied-biased-mqa": {
        "tie_word_embeddings": True, "attention_bias": True, "head_dim": 6, "num_key_value_heads": 1,
        "rope_parameters": LLAMA3,
    },
    "yarn": {"rope_parameters": YARN, "rms_norm_eps": 1e-3},
    "yarn-attention": {"rope_parameters": YARN | {"attention_factor": 0.9, "beta_fast": 8.0, "truncate": False}},
    "linear-gqa": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}  # fmt: skip


@pytest.mark.parametrize(
    "shape", ["tied-biased-mqa", *(pytest.param(s, marks=pytest.mark.full) for s in SHAPES if s != "tied-biased-mqa")]
)
def test_parity(shape, tmp_path):
    parity.check(LlamaForCausalLM, LlamaConfig(**(SIZES | SHAPES[shape])), tmp_path)


def test_what_is_not_computed_is_refused():
    data = LlamaConfig(**SIZES).to_dict()
    changes = {"mlp_bias": True, "rope_interleaved": True, "hidden_act": "gelu", "partial_rotary_factor": 0.5}
    for key, value in changes.items():
        with pytest.raises(ConfigError, match=key):
            read(Keys(data | {key: value}))
