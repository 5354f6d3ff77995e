"""A loss that spikes sends the run back to its newest checkpoint and past the rows; killed and resumed, to the bit."""

import json
import math

import pytest

from turnout import ConfigError
from turnout.launch.compose import compose
from turnout.moe.train.spikes import find, remember
from turnout.moe.train.state import Progress
from turnout.moe.train.trace import read_trace
from turnout.parallel import process
from turnout.parallel.checkpoint import latest
from turnout.tests.helpers import poison
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

WILD = 50.0  # times the logits: a loss of several times the usual


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def words(data):
    return tiny(data, "train.spike=1.5", "train.steps=14", "train.save_every=4")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run whose twelfth batch spikes."""
    run = tmp_path_factory.mktemp("whole")
    assert poison.train(str(run), words, {11: WILD}) == "done"
    return run


def test_a_spike_is_above_factor_times_the_median_of_enough_losses():
    losses = (9.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 2.0, 2.0, 0.0)
    assert find(Progress(losses=losses), 4.0, 2.0) is None
    found = find(Progress(step=7, losses=losses), 4.1, 2.0)
    assert (found.step, found.loss, found.median) == (8, 4.1, 2.0)
    assert find(Progress(losses=losses[1:]), 4.1, 2.0) is None, "nine are too few"
    assert remember(range(60), 60.0)[:1] == (11,)
    assert len(remember(range(60), 60.0)) == 50


def test_two_ranks_rewind_together_past_the_rows(words, tmp_path):
    words = [*words, "moe=deepseek_v3", "parallel.ep=2", "moe.trace=true", "train.keep=4"]
    run, plain, off = (tmp_path / name for name in ("run", "plain", "off"))
    assert run_ranks(poison.train, 2, str(run), words, {11: WILD}) == ["done", "done"]
    assert run_ranks(poison.train, 2, str(plain), words, {}, None, (8, 12)) == ["done", "done"]
    assert fingerprint(run, 14) == fingerprint(plain, 14)
    (row,) = rows(run, "rewind")
    assert (row["step"], row["to_step"]) == (12, 8)
    assert row["loss"] > 1.5 * row["median"] > 1.0
    assert [row["step"] for row in rows(run)] == list(range(1, 15))
    assert [r["loss"] for r in rows(run)] == [r["loss"] for r in rows(plain)]
    assert read_trace(run, 9)["index"].tolist() == read_trace(plain, 9)["index"].tolist()
    assert latest(run / "checkpoints").meta["rewinds"] == 1
    assert run_ranks(poison.train, 2, str(off), [*words, "train.spike=null"], {11: WILD}) == ["done", "done"]
    assert not rows(off, "rewind")
    assert fingerprint(off, 8) == fingerprint(run, 8)
    assert fingerprint(off, 14) != fingerprint(run, 14)


@pytest.mark.full
def test_deepspeed_skips_and_rewinds_as_the_native_engine_does(words, tmp_path):
    words = [*words, "engine=deepspeed", "optim=adamw", "optim.weight_decay=0", "train.dtype=float32", "parallel.ep=2"]
    words += ["train.keep=4", "train.skip_nonfinite=1"]
    for name, factors, jump in (("run", {2: math.nan, 11: WILD}, None), ("plain", {2: math.nan}, (8, 12))):
        arguments = (str(tmp_path / name), words, factors, None, jump)
        ended = run_ranks(poison.train, 2, *arguments, fresh=True, env={"DS_ACCELERATOR": "cpu"})
        assert ended == ["done", "done"]
    assert (len(rows(tmp_path / "run", "skip")), len(rows(tmp_path / "run", "rewind"))) == (1, 1)
    assert fingerprint(tmp_path / "run", 14) == fingerprint(tmp_path / "plain", 14)


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_killed_after_a_rewind_reads_on_behind_the_rows(words, whole, tmp_path, noted):
    assert poison.train(str(tmp_path), words, {11: WILD}, kill_after=14) == "killed"
    assert json.loads((tmp_path / "rewind.json").read_text())["cursor"] == {"epoch": 0, "row": 48}
    assert [row["step"] for row in rows(tmp_path)][-2:] == [9, 10], "two steps after the rewind"
    if not noted:
        (tmp_path / "rewind.json").unlink()
    assert poison.train(str(tmp_path), [*words, "train.resume=true"], {}) == "done"
    assert (fingerprint(tmp_path, 14) == fingerprint(whole, 14)) == noted
    if noted:
        assert rows(tmp_path, "rewind") == rows(whole, "rewind")
        assert latest(tmp_path / "checkpoints").meta["rewinds"] == 1


def test_a_note_about_another_checkpoint_moves_nothing(words, whole, tmp_path):
    poison.train(str(tmp_path), words, {}, kill_after=10)
    note = json.loads((whole / "rewind.json").read_text())
    (tmp_path / "rewind.json").write_text(json.dumps({**note, "checkpoint": "0" * 64}))
    poison.train(str(tmp_path), [*words, "train.resume=true"], {})
    assert latest(tmp_path / "checkpoints").meta["cursor"] == {"epoch": 0, "row": 56}


def test_the_last_rewind_is_followed_by_an_error_on_every_rank(words, tmp_path):
    words = [*words, "train.rewinds=1", "parallel.ep=2"]
    errors = run_ranks(poison.train, 2, str(tmp_path), words, {11: WILD, 14: WILD})
    assert errors[0] == errors[1]
    assert "of step 11 is above 1.5 x the median" in errors[0]
    assert "train.rewinds (1) are used up" in errors[0]
    assert len(rows(tmp_path, "rewind")) == 1


def test_without_a_checkpoint_a_spike_is_told_and_the_run_goes_on(words, tmp_path):
    assert poison.train(str(tmp_path), [*words, "train.save_every=null"], {11: WILD}) == "done"
    assert [row["step"] for row in rows(tmp_path, "spike")] == [12]
    assert not rows(tmp_path, "rewind")
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 15))


def test_looking_for_spikes_is_one_sum_a_step_and_none_when_it_is_off(words, tmp_path, monkeypatch):
    counted = []
    real = process.all_sum
    monkeypatch.setattr(process, "all_sum", lambda t, what="a sum": (counted.append(what), real(t, what))[1])
    for name, word, sums in (("on", "train.spike=9", 3), ("off", "train.spike=null", 0)):
        counted.clear()
        poison.train(str(tmp_path / name), [*words, word, "train.steps=3"], {})
        assert counted.count("mean loss of the step") == sums
    assert fingerprint(tmp_path / "on", 3) == fingerprint(tmp_path / "off", 3)


@pytest.mark.parametrize(("word", "rule"), [("train.spike=1", "above 1"), ("train.rewinds=-1", "not be negative")])
def test_settings_that_can_not_work_are_refused(data, word, rule):
    with pytest.raises(ConfigError, match=rule):
        compose(tiny(data, word))
