"""Stretched rotary frequencies against transformers' own, and the one that it has no name for against its formula."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from turnout.moe.config import ModelConfig, RopeConfig
from turnout.moe.layers.rotary import Rotary, frequencies, magnitude

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHES = [
    ("linear", 4.0, {}),
    ("llama3", 8.0, LLAMA3),
    ("llama3", 32.0, {"low_freq_factor": 2.0, "high_freq_factor": 16.0}),
    ("yarn", 4.0, {}),
    ("yarn", 32.0, {"truncate": False}),
    ("yarn", 40.0, {"beta_fast": 16.0, "beta_slow": 2.0, "magnitude": 1.25}),
    ("yarn", 1.0, {}),
]


@pytest.mark.parametrize(("kind", "factor", "more"), STRETCHES)
@pytest.mark.parametrize(("d", "theta", "length"), [(64, 150000.0, 4096), (8, 1e4, 16), (2, 1e4, 4096)])
def test_frequencies_are_those_of_transformers(kind, factor, more, d, theta, length):
    theirs = {"attention_factor" if name == "magnitude" else name: value for name, value in more.items()}
    given = {"rope_type": kind, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": length}
    config = LlamaConfig(head_dim=d, max_position_embeddings=round(length * factor), rope_parameters=given | theirs)
    truth, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    stretch = RopeConfig(kind=kind, factor=factor, original_len=length, **more)
    torch.testing.assert_close(frequencies(theta, stretch, d, torch.float32), truth, rtol=2e-6, atol=0)
    assert magnitude(stretch) == pytest.approx(scale)


def test_ntk_stretches_the_slowest_dimension_whole_and_the_fastest_not_at_all():
    d, theta, factor = 64, 1e4, 8.0
    plain = frequencies(theta, None, d, torch.float64)
    found = frequencies(theta, RopeConfig(kind="ntk", factor=factor), d, torch.float64)
    base = theta * factor ** (d / (d - 2))
    torch.testing.assert_close(found, torch.tensor([base ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64))
    assert found[0] == plain[0]
    assert float(plain[-1] / found[-1]) == pytest.approx(factor)


def test_queries_and_keys_turn_alike_and_grow_alike():
    sizes = {"vocab_size": 9, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_width": 4}
    rope = RopeConfig(kind="yarn", factor=8.0, original_len=16)
    rotary = Rotary(ModelConfig(**sizes, max_seq_len=128, rope=rope), 8)
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    q, k = rotary(torch.tensor([0, 1, 16, 100, 127]), {}, x, x[:, :1])
    torch.testing.assert_close(q[:, :1], k, rtol=0, atol=0)
    torch.testing.assert_close(q.norm(dim=-1), x.norm(dim=-1) * (0.1 * math.log(8) + 1))
