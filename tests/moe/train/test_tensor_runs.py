"""Runs that divide layers: their checkpoints are those of one rank, and go on at any division."""

from pathlib import Path

import pytest
import torch

from turnout.launch.compose import compose
from turnout.moe.models.store import load_model
from turnout.moe.train import state
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.checkpoint import latest
from turnout.parallel.mesh import build_mesh
from turnout.tests.distributed.tiny_training import whole
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, rows, tiny


def go(run: str, words: list[str], steps: int | None = None) -> dict:
    """Take up to `steps` steps (None: all, then evaluate and export) and save; this rank's state and where it lies."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    votes = iter(range(10**9))
    mesh = build_mesh(config.parallel, "cpu", config.model.moe.num_experts)
    trainer = Trainer(config, Path(run), mesh, lambda: next(votes) == steps)
    trainer.run()
    named = state.tensors(trainer.setup.model, trainer.setup.engine.optimizers, trainer.setup.shards)
    return {
        "state": {name: tensor.clone() for name, (tensor, _) in named.items()},
        "shards": {name: place for name, (_, place) in named.items()},
    }


@pytest.fixture
def words(tmp_path):
    fixed = ["optim=adamw", "train.dtype=float32", "train.save_every=null", "train.steps=100", "moe.num_experts=4"]
    return tiny(corpus(tmp_path), "moe=mixtral", "moe.every=2", *fixed)


@pytest.mark.parametrize("attention", ["{}", "{qkv_bias: true, output_bias: true, sinks: true, qk_norm: head}"])
def test_a_run_of_two_ranks_goes_on_at_one_and_back_with_equal_state(tmp_path, words, attention):
    words = [*words, f"model.attention={attention}"]
    run, resumed, divided = str(tmp_path / "run"), [*words, "train.resume=true"], ["parallel.tp=2", "parallel.ep=2"]
    two = whole(run_ranks(go, 2, run, [*words, *divided], 3), "state")
    one = go(run, resumed, 0)["state"]
    assert_same(one, two)
    assert one["model/blocks.0.ffn.w_in.weight"].shape == (2, 64, 32), "gates and up projection are divided alike"
    assert "optim/blocks.0.attention.wq.weight/exp_avg" in one
    assert ("optim/blocks.0.attention.sinks/exp_avg" in one) == ("sinks" in attention)
    assert_same(whole(run_ranks(go, 2, run, [*resumed, *divided], 0), "state"), two)
    later = go(run, resumed, 2)["state"]
    assert not torch.equal(later["model/embed.weight"], one["model/embed.weight"])
    assert_same(whole(run_ranks(go, 2, run, [*resumed, *divided], 0), "state"), later)
    assert latest(tmp_path / "run" / "checkpoints").step == 5


@pytest.mark.parametrize("settings", [[], ["moe=switch", "train.micro_batch=1"]], ids=["dropless", "rows cut, drops"])
def test_a_run_of_two_ranks_trains_evaluates_and_exports_what_one_rank_does(tmp_path, words, settings):
    words = [*words, "train.steps=3", *settings]
    run_ranks(go, 2, str(tmp_path / "two"), [*words, "parallel.tp=2"])
    go(str(tmp_path / "one"), words)
    for kind, name in (("train", "loss"), ("train", "aux_loss"), ("train", "grad_norm"), ("eval", "val_loss")):
        two, one = ([row[name] for row in rows(tmp_path / run, kind)] for run in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-5), name
        assert len(one) == (3 if kind == "train" else 1)
    two, one = (dict(load_model(tmp_path / run).named_parameters()) for run in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("divided", [[], ["parallel.tp=2"]], ids=["whole", "divided"])
def test_a_run_starts_from_the_weights_of_another(tmp_path, words, divided):
    run_ranks(go, 2, str(tmp_path / "first"), [*words, "train.steps=1", "parallel.tp=2"])
    trained = dict(load_model(tmp_path / "first").named_parameters())
    more = [*words, f"train.init={tmp_path / 'first'}", *divided]
    started = whole(run_ranks(start, 2, str(tmp_path / "second"), more), "state")
    assert started.keys() == trained.keys()
    for name, weight in trained.items():
        assert torch.equal(started[name], weight), name


def start(run: str, words: list[str]) -> dict:
    """The model that a run begins with."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    trainer = Trainer(config, Path(run), build_mesh(config.parallel, "cpu", 4), lambda: True)
    trainer.metrics.close()
    return {"state": trainer.setup.model.state_dict(), "shards": trainer.setup.shards}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
