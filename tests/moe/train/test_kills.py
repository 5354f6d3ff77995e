"""Killed at any moment, resumed, the same bits; and what a checkpoint may not forget for that to hold."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from turnout.launch.compose import compose
from turnout.launch.rank import StopSignal
from turnout.moe.data.rows import Cursor
from turnout.moe.train import loop
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.checkpoint import latest
from turnout.parallel.checkpoint.writer import committed
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.forks import ends, start, start_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny
from turnout.tests.parallel.checkpoint.flaky import FlakyDisk, GatedDisk

STEPS = 24
OPERATIONS = 9  # of the disk in a save, at most


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Accumulation, and a router that draws random numbers."""
    data = corpus(tmp_path_factory.mktemp("corpus"))
    drawn = ("moe=gshard", "moe.jitter=0.01", "moe.expert_dropout=0.1")
    return tiny(data, *drawn, "train.micro_batch=1", f"train.steps={STEPS}", "train.save_every=2")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run on two ranks that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert ends(start_ranks(go, 2, str(run), words)) == [0, 0]
    return run


def trainer_of(run: str, words: list[str], boundary) -> Trainer:
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    mesh = build_mesh(config.parallel, "cpu", config.model.moe.num_experts)
    trainer = Trainer(config, Path(run), mesh, lambda: boundary(trainer))
    return trainer


def go(run: str, words: list[str], victim: int | None = None, at: int = 0) -> None:
    """Train; rank `victim` kills itself at the disk operation number `at`."""
    trainer = trainer_of(run, words, lambda trainer: False)
    if process.rank() == victim:
        trainer.saver.disk = FlakyDisk(at, "kill")
    trainer.run()


def steps(run: Path) -> list[int]:
    return [step for step, _ in committed(run / "checkpoints")]


def kill_once(run: Path, words: list[str], chance: random.Random, duration: float) -> str:
    """Train on in `run` until some rank is killed: at a random time, or at a random disk operation of its saves.

    Returns:
        "save", "time", or "done" when the run was complete before.
    """
    words = [*words, "train.resume=true", f"train.async_save={chance.choice(['true', 'false'])}"]
    before, victim = steps(run), chance.randrange(2)
    if chance.random() < 0.4:
        children = start_ranks(go, 2, str(run), words, victim, chance.randrange(2 * OPERATIONS))
        children[victim].join(60)
        how = "save"
    else:
        children = start_ranks(go, 2, str(run), words)
        deadline = time.monotonic() + 60
        while steps(run) == before and time.monotonic() < deadline and children[0].is_alive():
            time.sleep(0.005)
        time.sleep(chance.random() * duration)
        how = "done" if children[victim].exitcode == 0 else "time"
        children[victim].kill()
    time.sleep(0.02)
    children[1 - victim].kill()  # its machine goes too; that it would have noticed is proven elsewhere
    codes = ends(children)
    return "done" if codes == [0, 0] else how


def test_eight_kills_at_random_moments_cost_nothing_but_time(words, whole, tmp_path):
    _killed(words, whole, tmp_path, random.Random(1), kills=8)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_at_random_moments_cost_nothing_but_time(words, whole, tmp_path, seed):
    _killed(words, whole, tmp_path, random.Random(100 + seed), kills=16)


def _killed(words: list[str], whole: Path, tmp_path: Path, chance: random.Random, kills: int) -> None:
    """Kill until there were enough kills of both kinds, in one run as long as it lasts; every run ends with the bits of
    `whole`."""
    number, left = 0, kills
    while left > 0:
        run = tmp_path / str(number)
        run.mkdir()
        number += 1
        while left > 0 and (how := kill_once(run, words, chance, duration=0.15)) != "done":
            left -= 1
        assert ends(start_ranks(go, 2, str(run), [*words, "train.resume=true"])) == [0, 0]
        assert fingerprint(run, STEPS) == fingerprint(whole, STEPS), how
        assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(whole)]
        assert not (run / "checkpoints" / "quarantine").exists(), "nothing half written was ever taken for a checkpoint"


def forgetful(run: str, words: list[str], forgotten: str, kill_at: int | None) -> None:
    """Train; with `kill_at`, die at that step boundary. What was `forgotten` is not taken from the checkpoint."""

    def boundary(trainer):
        if trainer.now.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    trainer = trainer_of(run, words, boundary)
    begin, part_of = trainer.now.step, loop.part_of
    if forgotten == "data cursor":
        trainer.now = replace(trainer.now, cursor=Cursor())
    if forgotten == "random streams":
        loop.part_of = lambda *args, step, **options: part_of(*args, step=step - begin, **options)
    trainer.run()


@pytest.fixture(scope="module")
def killed(words, tmp_path_factory):
    """The words of a short run, and where it lies `whole` and killed before its last step."""
    words, runs = [*words, "train.steps=6"], tmp_path_factory.mktemp("runs")
    assert ends([start(forgetful, str(runs / "whole"), words, "nothing", None)]) == [0]
    assert ends([start(forgetful, str(runs / "parts"), words, "nothing", 5)]) == [-signal.SIGKILL]
    return words, runs


@pytest.mark.parametrize("forgotten", ["nothing", "data cursor", "random streams"])
def test_a_checkpoint_that_forgot_cursor_or_random_streams_would_be_seen(killed, tmp_path, forgotten):
    words, runs = killed
    shutil.copytree(runs / "parts", tmp_path / "parts")
    assert ends([start(forgetful, str(tmp_path / "parts"), [*words, "train.resume=true"], forgotten, None)]) == [0]
    same = fingerprint(runs / "whole", 6) == fingerprint(tmp_path / "parts", 6)
    assert same == (forgotten == "nothing")


def stopped_in_a_save(run: str, words: list[str]) -> int:
    """Train under the signals of a run; the disk of the second save never answers. Says when that save has begun."""
    stop = StopSignal()
    stop.install()

    def boundary(trainer):
        if trainer.now.step == 2 and not isinstance(trainer.saver.disk, GatedDisk):
            trainer.saver.settle()
            trainer.saver.disk = TellingDisk(Path(run) / "begun")
        return stop()

    trainer_of(run, words, boundary).run()
    return 0


class TellingDisk(GatedDisk):
    def __init__(self, file: Path) -> None:
        super().__init__(60.0)
        self.file = file

    def open(self, path):
        self.file.touch()
        return super().open(path)


@pytest.mark.parametrize("behind", ["true", "false"])
def test_a_second_sigterm_inside_a_save_ends_at_once_and_keeps_the_last_commit(words, tmp_path, behind):
    child = start(stopped_in_a_save, str(tmp_path), [*words, f"train.async_save={behind}"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert child.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(2.2)  # a repetition within two seconds counts as the same request
    assert child.is_alive(), "the first one waits for the save"
    os.kill(child.pid, signal.SIGTERM)
    child.join(5)
    assert child.exitcode == 143
    assert latest(tmp_path / "checkpoints").step == 2
