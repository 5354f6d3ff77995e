"""Mistral, Mixtral, Qwen and OLMoE, against transformers."""

import re
from pathlib import Path

import pytest
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from turnout.moe.families.family import MODULES
from turnout.tests.moe.families import parity
from turnout.tests.moe.families.test_llama import LLAMA3, YARN

SIZES = {
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 96, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig),
}
# family, whether in the quick tier, what differs from SIZES
SHAPES = [
    ("mixtral", True, {"num_local_experts": 5, "sliding_window": 7, **WIDE}),
    ("mixtral", False, {"num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True, "head_dim": 6}),
    ("mixtral", False, {"num_local_experts": 4, "head_dim": 8, "rope_parameters": YARN, "num_key_value_heads": 1}),
    ("mistral", True, {**WIDE, "sliding_window": 7, "head_dim": 10}),
    ("mistral", False, {"sliding_window": None, "rope_parameters": YARN, "tie_word_embeddings": True}),
    ("qwen2", True, {**WIDE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen2", False, {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("qwen2_moe", True, {
        **QWEN, "shared_expert_intermediate_size": 28, "num_hidden_layers": 4, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3,
    }),
    ("qwen2_moe", False, {
        **QWEN, **WIDE, "shared_expert_intermediate_size": 8, "norm_topk_prob": True, "num_experts_per_tok": 4,
        "tie_word_embeddings": True, "rope_parameters": LLAMA3,
    }),
    ("qwen2_moe", False, {**QWEN, "qkv_bias": False, "num_hidden_layers": 3, "decoder_sparse_step": 3}),
    ("qwen3", False, {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", False, {
        **WIDE, "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
        "max_window_layers": 1, "rope_parameters": YARN,
    }),
    ("qwen3_moe", True, {**QWEN, **WIDE, "head_dim": 10, "norm_topk_prob": True, "rope_parameters": YARN}),
    ("qwen3_moe", False, {
        **QWEN, "head_dim": 6, "num_hidden_layers": 3, "mlp_only_layers": [0], "use_sliding_window": True,
        "sliding_window": 5, "attention_bias": True, "num_key_value_heads": 1,
    }),
    ("olmoe", True, {**WIDE, "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.8}),
    ("olmoe", False, {
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "attention_bias": True,
        "tie_word_embeddings": True, "num_key_value_heads": 1,
    }),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape"),
    [pytest.param(name, shape, marks=() if quick else pytest.mark.full) for name, quick, shape in SHAPES],
)
def test_parity(name, shape, tmp_path):
    model_class, config_class = FAMILIES[name]
    parity.check(model_class, config_class(**(SIZES | shape)), tmp_path)


def test_the_page_of_families_has_a_row_for_each():
    page = Path(__file__).parents[3] / "docs" / "families.md"
    rows = [line.split("|")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted([*MODULES])
