"""Students with some of their teacher's blocks."""

import pytest
import torch

from turnout import ConfigError
from turnout.moe import Decoder
from turnout.moe.compress.layers import shallower, spread
from turnout.moe.config import AttentionConfig, EncoderConfig
from turnout.tests.helpers.decoders import logits, make_config, make_model


def test_blocks_are_spaced_evenly_and_each_kind_among_its_own():
    assert spread(make_config(None, layers=12), 6) == (0, 2, 4, 6, 8, 10)
    assert spread(make_config(None, layers=5), 3) == (0, 1, 3)
    sparse = make_config({"every": 2}, layers=8)
    assert spread(sparse, 4) == (0, 1, 4, 5)
    assert shallower(sparse, spread(sparse, 4)).moe_layers == (1, 3)
    assert spread(sparse, 8) == tuple(range(8))
    assert spread(sparse, 1) == (1,), "a sparse model stays one"
    assert spread(make_config({"every": 1}), 2) == (0, 2)
    for layers in (0, 9):
        with pytest.raises(ConfigError, match=rf"layers \({layers}\) must lie in 1 to model.layers \(8\)"):
            spread(sparse, layers)


@pytest.mark.parametrize("kept", [(0, 1), (1, 2, 3), (3,), (0, 2)])
def test_a_student_computes_what_its_teachers_blocks_compute(kept):
    teacher = make_model({"every": 2})
    cfg = shallower(teacher.cfg, kept)
    assert cfg.moe_layers == tuple(new for new, old in enumerate(kept) if old in (1, 3))
    assert (cfg.moe is None) == (kept == (0, 2))
    teacher.blocks = torch.nn.ModuleList(teacher.blocks[layer] for layer in kept)
    student = Decoder(cfg).eval()
    student.load_state_dict(teacher.state_dict())
    assert torch.equal(logits(student), logits(teacher))


def test_all_layers_are_the_teacher_itself():
    cfg = make_config({"every": 2})
    assert shallower(cfg, range(cfg.layers)) == cfg


def test_windows_follow_their_layers():
    cfg = make_config(None, attention=AttentionConfig(window=4, window_layers=(0, 3)))
    assert shallower(cfg, (1, 3)).attention.window_layers == (1,)


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0), (0, 4), (-1, 2)])
def test_what_is_no_choice_of_layers_is_refused(kept):
    with pytest.raises(ConfigError, match=r"must be ids of model.layers \(4\), each once and in ascending order"):
        shallower(make_config({"every": 2}), kept)


def test_hash_routing_keeps_its_layers_ids():
    cfg = make_config({"every": 2, "router": "hash"})
    assert shallower(cfg, (0, 1)).moe_layers == (1,)
    with pytest.raises(ConfigError, match=r"moe.router \(hash\) chooses by the layer's id"):
        shallower(cfg, (1, 2))


def test_an_encoder_stays():
    encoder = EncoderConfig(layers=2, start_token_id=0)
    relative = AttentionConfig(positions="relative")
    teacher = make_model({"every": 2}, kv_heads=4, attention=relative, encoder=encoder)
    cfg = shallower(teacher.cfg, (0, 2))
    assert cfg.moe_layers == (3,)  # the encoder's second block
    teacher.blocks = torch.nn.ModuleList(teacher.blocks[layer] for layer in (0, 2))
    Decoder(cfg).load_state_dict(teacher.state_dict())
