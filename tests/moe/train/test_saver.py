"""Saving behind the steps is saving: the same bytes, told only when committed, and a failure is never passed over."""

import errno
import resource
import time
from pathlib import Path

import pytest

from turnout import CheckpointError, ConfigError
from turnout.launch.compose import compose
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.checkpoint import latest
from turnout.parallel.checkpoint.writer import DISK, committed
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.overheads import measure
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny
from turnout.tests.parallel.checkpoint.flaky import FlakyDisk, GatedDisk

ASYNC = "train.async_save=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def trainer_of(run, words, disk=DISK, boundary=lambda trainer: False) -> Trainer:
    """One rank's trainer, whose checkpoints go through `disk`; `boundary(trainer)` says whether to stop."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    mesh = build_mesh(config.parallel, "cpu", config.model.moe.num_experts)
    trainer = Trainer(config, Path(run), mesh, lambda: boundary(trainer))
    trainer.saver.disk = disk
    return trainer


def steps(run) -> list[int]:
    return [step for step, _ in committed(Path(run) / "checkpoints")]


def compare(root: str, words: list[str]) -> None:
    """A run that saves within its steps, and one that saves behind them, whose disk opens a step later."""

    def open_later(trainer):
        if trainer.now.step == 3:
            assert trainer.saver.writing
            assert not trainer.saver.holds(2)
            disk.gate.set()
        return False

    trainer_of(f"{root}/within", words).run()
    disk = GatedDisk()
    trainer_of(f"{root}/behind", [*words, ASYNC], disk, open_later).run()


@pytest.mark.parametrize("world", [1, 2])
def test_saving_behind_the_steps_writes_the_same_bits(data, tmp_path, world):
    words = tiny(data, "moe=deepseek_v3", "train.keep=9", f"parallel.ep={world}")
    run_ranks(compare, world, str(tmp_path), words)
    assert steps(tmp_path / "behind") == steps(tmp_path / "within") == [2, 4, 6]
    for step in (2, 4, 6):
        assert fingerprint(tmp_path / "behind", step) == fingerprint(tmp_path / "within", step)


def test_a_run_that_is_stopped_waits_for_the_save_under_way(data, tmp_path):
    disk = GatedDisk(seconds=0.5)
    outcome = trainer_of(tmp_path, tiny(data, ASYNC), disk, lambda trainer: trainer.now.step == 3).run()
    assert (outcome.step, outcome.preempted) == (3, True)
    assert steps(tmp_path) == [2, 3]


def test_at_most_one_save_is_under_way(data, tmp_path):
    disk = GatedDisk(seconds=0.3)
    trainer_of(tmp_path, tiny(data, ASYNC, "train.save_every=1", "train.keep=9"), disk).run()
    assert disk.most == 1
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def failing(run: str, words: list[str]) -> tuple[str, int]:
    """The disk of the last rank fails in the save of step 2; the error, and the step at which it was told."""
    last = process.rank() == process.world() - 1
    trainer = trainer_of(run, words, FlakyDisk(1 if last else -1, errno.EIO))
    try:
        trainer.run()
    except CheckpointError as error:
        return str(error), trainer.now.step
    return "", trainer.now.step


@pytest.mark.parametrize("word", [ASYNC, "train.async_save=false"])
def test_a_failure_on_one_rank_is_told_by_all_before_the_next_save(data, tmp_path, word):
    results = run_ranks(failing, 2, str(tmp_path), tiny(data, "parallel.ep=2", word))
    assert results[0] == results[1]
    message, step = results[0]
    assert message.startswith("rank 1: ")
    assert "rank-00001.safetensors" in message
    assert 2 <= step < 4
    assert steps(tmp_path) == []
    assert not list((tmp_path / "checkpoints").iterdir()), "half a checkpoint is removed"


def full_disk(run: str, words: list[str], full: tuple[int, int]) -> tuple[str, int]:
    """Train while the kernel refuses files above 20,000 bytes from step `full[0]` until step `full[1]`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def boundary(trainer):
        here = full[0] <= trainer.now.step < full[1]
        while trainer.saver.writing:  # so that a save meets one kind of disk
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if here else soft, hard))
        return False

    trainer = trainer_of(run, words, boundary=boundary)
    try:
        trainer.run()
    except CheckpointError as error:
        return str(error), trainer.now.step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "", trainer.now.step


@pytest.mark.parametrize("word", [ASYNC, "train.async_save=false"])
def test_so_many_saves_may_fail_in_a_row_and_then_the_run_stops(data, tmp_path, word):
    words = tiny(data, word, "train.save_every=1", "train.save_failures=2", "log.every=100", "train.steps=8")
    assert full_disk(str(tmp_path / "short"), words, (2, 4)) == ("", 8)
    failed = rows(tmp_path / "short", "save_failed")
    assert [(row["step"], row["in_a_row"]) for row in failed] == [(3, 1), (4, 2)]
    assert latest(tmp_path / "short" / "checkpoints").step == 8
    message, step = full_disk(str(tmp_path / "long"), words, (2, 9))
    assert step == 5, "the third in a row stops the run"
    assert "bytes needed" in message
    assert "File too large" in message
    assert [row["step"] for row in rows(tmp_path / "long", "save_failed")] == [3, 4]
    assert latest(tmp_path / "long" / "checkpoints").step == 2
    message, _ = full_disk(str(tmp_path / "none"), [*words, "train.save_failures=0"], (2, 9))
    assert "bytes needed" in message
    assert not rows(tmp_path / "none", "save_failed")


def test_the_last_save_of_a_run_must_not_fail(data, tmp_path):
    words = tiny(data, "train.save_failures=9", "train.save_every=null", "log.every=100")
    assert full_disk(str(tmp_path), words, (1, 99))[0]


def test_a_limit_below_zero_is_refused(data):
    with pytest.raises(ConfigError, match=r"train\.save_failures \(-1\) must not be negative"):
        compose(tiny(data, "train.save_failures=-1"))


def test_the_cost_of_each_safety_is_measured_in_one_run(data, tmp_path):
    found = measure(str(tmp_path / "run"), tiny(data, "train.steps=4"))
    assert len(found) == 6
    assert all(value > 0 for value in found.values())
    assert found["hashing"] < found["a save within the steps"], "it is a part of it"
