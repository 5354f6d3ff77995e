"""A run whose layers are divided over ranks: the rows, evaluations, checkpoints and faults of one rank."""

import json
import math
from pathlib import Path

import pytest
import torch

from turnout.launch.compose import compose
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.store import load_model
from turnout.moe.train import state
from turnout.moe.train.loop import Trainer
from turnout.moe.train.moments import Rounding
from turnout.moe.train.trace import read_trace
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.parallel.pipeline import keep_stages
from turnout.parallel.shard import ShardSpec
from turnout.tests.distributed.tiny_training import Case, model_config
from turnout.tests.helpers import poison
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny
from turnout.tests.moe.train.test_loop import go, untimed

PIPED = ["parallel.pp=2", "train.micro_batch=2"]

ALONE = [*(f"parallel.{name}=1" for name in ("pp", "virtual", "ep", "tp", "cp")), "parallel.schedule=1f1b"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def assert_same_rows(ours: Path, theirs: Path, rel: float) -> None:
    for kind in ("train", "eval"):
        found, expected = ([alike(row) for row in rows(run, kind)] for run in (ours, theirs))
        assert [list(row) for row in found] == [list(row) for row in expected] != []
        for row, wanted in zip(found, expected, strict=True):
            for key in wanted:
                assert numbers(row[key]) == pytest.approx(numbers(wanted[key]), rel=rel, abs=1e-9), (row["step"], key)


def alike(row: dict) -> dict:
    """What no layout may change."""
    return {key: value for key, value in untimed(row).items() if not key.startswith("all_to_all")}


def numbers(value) -> list[float]:
    """What a field holds, without its nesting."""
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, ["moe=deepseek_v3", "model.layers=3", "moe.bias_rate=0.01"]),
        (2, ["moe=gshard", "model.layers=4", "parallel.virtual=2", "model.tie_embeddings=false"]),
        (2, ["model.moe=null", "parallel.schedule=gpipe", "train.micro_batch=1"]),
        (4, ["moe=switch", "train.recompute=full", "parallel.ep=2", "train.micro_batch=1"]),
        pytest.param(4, ["moe=gshard", "parallel.tp=2", "parallel.ep=2"], marks=pytest.mark.full),
        pytest.param(4, ["moe=gshard", "parallel.cp=2", "parallel.ep=2"], marks=pytest.mark.full),
    ],
)
def test_a_pipeline_writes_the_rows_of_one_rank(data, tmp_path, ranks, words):
    words = tiny(data, "train.dtype=float32", "optim=adamw", "train.eval_every=3", *PIPED, *words)
    run_ranks(go, ranks, str(tmp_path / "piped"), words)
    go(str(tmp_path / "one"), [*words, *ALONE])
    assert_same_rows(tmp_path / "piped", tmp_path / "one", rel=1e-4)


def held(run: str, words: list[str]) -> dict[str, torch.Tensor]:
    """What this rank's model and optimizers hold after resuming."""
    config = compose([*words, "train.resume=true"], world=process.world()).config
    trainer = Trainer(config, Path(run), build_mesh(config.parallel, "cpu", 16), lambda: False)
    trainer.metrics.close()
    named = state.tensors(trainer.setup.model, trainer.setup.engine.optimizers, trainer.setup.shards)
    return {name: tensor.clone() for name, (tensor, _) in named.items()}


@pytest.mark.parametrize("optim", ["optim=adamw", "optim=muon optim.state_dtype=bfloat16", "optim=adafactor"])
def test_states_of_a_pipeline_are_those_of_one_rank_after_resuming_and_back(data, tmp_path, optim):
    words = tiny(data, *PIPED, *optim.split(), "moe=deepseek_v3", "train.steps=2", "train.save_every=null")
    alone = [*words, "parallel.pp=1"]
    for run, wrote in (("piped", 2), ("one", 1)):
        path = str(tmp_path / run)
        run_ranks(go, 2, path, words) if wrote == 2 else go(path, alone)
        one, two = held(path, alone), run_ranks(held, 2, path, words)
        both = two[0] | two[1]
        assert one.keys() == both.keys()
        assert {"model/blocks.1.ffn.router.balance_bias", "model/norm.weight"} <= two[1].keys() - two[0].keys()
        assert "model/embed.weight" in two[0].keys() & two[1].keys(), "a tied embedding is on both ends"
        for part in two:
            assert [name for name, tensor in part.items() if not torch.equal(tensor, one[name])] == []


def test_a_pipeline_that_was_stopped_resumes_to_the_same_bits_and_exports_its_model(data, tmp_path):
    words = tiny(data, *PIPED, "moe=deepseek_v3", "train.save_every=null")
    assert run_ranks(go, 2, str(tmp_path / "whole"), words)[0].step == 6
    assert run_ranks(go, 2, str(tmp_path / "parts"), words, 3)[0].preempted
    run_ranks(go, 2, str(tmp_path / "parts"), [*words, "train.resume=true"])
    assert fingerprint(tmp_path / "whole", 6) == fingerprint(tmp_path / "parts", 6)
    again = begin(str(tmp_path / "parts"), [*words, "parallel.pp=1", "train.resume=true"])
    exported = load_model(tmp_path / "parts").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in exported.items())
    started = [*tiny(data, *PIPED, "moe=deepseek_v3"), f"train.init={tmp_path / 'parts'}"]
    for part in run_ranks(begin, 2, str(tmp_path / "new"), started):
        assert all(torch.equal(tensor, exported[name]) for name, tensor in part.items())


def begin(run: str, words: list[str]) -> dict[str, torch.Tensor]:
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    trainer = Trainer(config, Path(run), build_mesh(config.parallel, "cpu", 16), lambda: False)
    trainer.metrics.close()
    return trainer.setup.model.state_dict()


def test_a_step_that_is_not_finite_on_the_last_stage_moves_nothing_on_any(data, tmp_path):
    words = tiny(data, *PIPED, "moe=deepseek_v3", "train.skip_nonfinite=1", "train.steps=4")
    assert run_ranks(poison.train, 2, str(tmp_path / "run"), words, {2: math.nan}) == ["done", "done"]
    assert run_ranks(poison.train, 2, str(tmp_path / "other"), words, {}, None, (2, 3)) == ["done", "done"]
    assert fingerprint(tmp_path / "run", 4) == fingerprint(tmp_path / "other", 4)
    assert len(rows(tmp_path / "run", "skip")) == 1
    assert json.loads((tmp_path / "run" / "nonfinite.json").read_text())["losses"][1] == "nan"


def test_a_pipeline_rewinds_past_a_spike_and_profiles(data, tmp_path):
    words = tiny(data, *PIPED, "train.spike=1.5", "train.steps=13", "train.save_every=4", "train.profile=1")
    assert run_ranks(poison.train, 2, str(tmp_path / "run"), words, {11: 50.0}) == ["done", "done"]
    assert run_ranks(poison.train, 2, str(tmp_path / "plain"), words, {}, None, (8, 12)) == ["done", "done"]
    assert fingerprint(tmp_path / "run", 13) == fingerprint(tmp_path / "plain", 13)
    assert [(row["step"], row["to_step"]) for row in rows(tmp_path / "run", "rewind")] == [(12, 8)]
    assert len(list((tmp_path / "run" / "profile").glob("rank-*.json.gz"))) == 2


def test_float16_in_a_pipeline_scales_its_loss_and_trains_as_float32_does(data, tmp_path):
    words = tiny(data, *PIPED, "moe=gshard", "moe.balance_loss=1.0", "train.steps=3")
    for dtype in ("float16", "float32"):
        run_ranks(go, 2, str(tmp_path / dtype), [*words, f"train.dtype={dtype}"])
    for found, wanted in zip(rows(tmp_path / "float16"), rows(tmp_path / "float32"), strict=True):
        assert found["loss_scale"] == 2.0**16
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-2)


def test_a_trace_of_a_pipeline_replays_on_one_rank_and_back(data, tmp_path):
    words = tiny(data, *PIPED, "moe=gshard", "moe.every=1", "train.dtype=float32", "optim=adamw", "train.steps=2")
    run_ranks(go, 2, str(tmp_path / "piped"), [*words, "moe.trace=true"])
    found = read_trace(tmp_path / "piped", 1)
    assert sorted(found["layers"]) == [0, 1]
    assert all(len(part["ids"]) == len(found["index"]) for part in found["layers"].values())
    alone = [*words, "parallel.pp=1", f"moe.replay={tmp_path / 'piped'}", "moe.trace=true"]
    go(str(tmp_path / "one"), alone)
    run_ranks(go, 2, str(tmp_path / "again"), [*words, f"moe.replay={tmp_path / 'one'}"])
    assert_same_rows(tmp_path / "one", tmp_path / "piped", rel=1e-5)
    assert fingerprint(tmp_path / "again", 2) == fingerprint(tmp_path / "piped", 2)


def test_moments_round_by_the_draws_of_the_whole_model():
    with torch.device("meta"):
        whole, part = (Decoder(model_config(Case())) for _ in range(2))
    shards = {name: ShardSpec(tuple(t.shape), (0,) * t.ndim) for name, t in whole.state_dict().items()}
    keep_stages(part, {1: range(1, 2)}, 1)
    numbers = []
    for model in (whole, part):
        parameters = dict(model.named_parameters())
        rounding = Rounding(parameters, shards, 0)
        numbers.append({name: (rounding._seeds[w], rounding._specs[w]) for name, w in parameters.items()})
    assert 0 < len(numbers[1]) < len(numbers[0])
    assert numbers[1].items() <= numbers[0].items()
