"""`turnout train` with a pipeline, as a user meets it: real processes, one of which dies or hangs."""

import json
import os
import signal
from pathlib import Path

import pytest

from turnout.tests.helpers.runs import corpus, rows, run, start, tiny
from turnout.tests.launch.test_train import TURNOUT, ending, ranks_of, steps_done, wait_for


def told(directory: Path) -> dict:
    path = directory / "exit.json"
    return json.loads(path.read_text())["ranks"] if path.exists() else {}


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_stage_ends_the_run_with_5_and_one_rank_goes_on(tmp_path, number):
    directory = tmp_path / "run"
    words = ["nproc=2", "parallel.pp=2", "train.micro_batch=1", "parallel.timeout=5", "train.steps=400"]
    process = start(*TURNOUT, *tiny(corpus(tmp_path), *words, f"run={directory}"))
    wait_for(lambda: steps_done(directory) >= 3, process, "the loss")
    (agent,) = ranks_of(process.pid)
    last = ranks_of(agent)[-1]
    os.kill(last, number)
    if number == signal.SIGSTOP:
        wait_for(lambda: "0" in told(directory), process, "the other rank's time-out")
        os.kill(last, signal.SIGKILL)  # it would hold torchrun up for a minute
    code, output = ending(process)
    assert code == 5, output
    assert {entry["code"] for entry in told(directory).values()} == {5}
    if number == signal.SIGSTOP:
        assert "failed on rank 0: a peer is gone or hangs" in told(directory)["0"]["reason"]
    saved = max(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").glob("step-*"))
    more = ["parallel.pp=1", "nproc=1", f"train.steps={saved + 2}"]
    resumed = run(*TURNOUT, f"train.resume={directory}", *more)
    assert resumed.returncode == 0, resumed.stdout
    assert [row["step"] for row in rows(directory)] == list(range(1, saved + 3))
