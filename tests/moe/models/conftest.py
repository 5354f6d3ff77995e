"""A small decoder with dense and sparse blocks."""

import pytest
import torch

from turnout.moe import Decoder, ModelConfig, MoEConfig
from turnout.moe.models.init import init_weights


@pytest.fixture
def make_config():
    def make(moe=None, **changes):
        settings = {
            "vocab_size": 50, "width": 24, "layers": 4, "heads": 4, "kv_heads": 2,
            "head_dim": 6, "ffn_width": 32, "max_seq_len": 64, "eos_token_id": 0,
        }  # fmt: skip
        sparse = {"width": 24, "expert_width": 16, "num_experts": 4, "init_scale": 2.0}
        return ModelConfig(**settings | changes, moe=MoEConfig(**sparse | (moe or {})))

    return make


@pytest.fixture
def make_model(make_config):
    def make(moe=None, seed=0, **changes):
        model = Decoder(make_config(moe, **changes))
        init_weights(model, seed)
        torch.manual_seed(seed)
        return model

    return make
