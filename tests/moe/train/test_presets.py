"""Every preset of `configs/moe/` trains in a decoder, evaluates, and is exported with its router in float32."""

import math

import pytest
import torch

from turnout.launch.compose import CONFIGS, compose
from turnout.moe.models.store import load_model
from turnout.moe.train.loop import train
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.runs import corpus, rows, tiny

PRESETS = sorted(path.stem for path in (CONFIGS / "moe").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_and_evaluates(data, tmp_path, preset):
    words = tiny(data, f"moe={preset}", "moe.noncausal=true", "train.steps=2", "train.micro_batch=2")
    config = compose(words).config
    experts = config.model.moe.num_experts
    train(config, tmp_path, build_mesh(config.parallel, "cpu", experts), lambda: False)
    trained, (evaluated,) = rows(tmp_path), rows(tmp_path, "eval")
    assert len(trained) == 2
    assert all(row["loss"] < math.log(400) + 1 and math.isfinite(row["aux_loss"]) for row in trained)
    assert all(math.isclose(sum(load), 1, rel_tol=1e-6) and len(load) == experts for load in trained[1]["expert_load"])
    assert evaluated["val_loss"] < math.log(400) + 1
    exported = load_model(tmp_path, "bfloat16").state_dict()
    assert {tensor.dtype for name, tensor in exported.items() if ".router." in name} <= {torch.float32}
    assert {tensor.dtype for name, tensor in exported.items() if ".router." not in name} == {torch.bfloat16}
