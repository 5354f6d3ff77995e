"""Faults of a run as its user meets them: lost and hanging peers, signals, bad data, restarts by torchrun."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from turnout.launch import elastic, rank
from turnout.launch.compose import compose
from turnout.parallel.checkpoint.writer import committed
from turnout.tests.helpers.forks import ends, start_ranks
from turnout.tests.helpers.forks import start as fork
from turnout.tests.helpers.runs import TIMEOUT, corpus, fingerprint, rows, run, start, tiny

TURNOUT = ("-m", "turnout", "train")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def ranks_below(root: int) -> dict[int, int]:
    """Rank → process id, of the ranks that descend from process `root`."""
    parents, found = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            env = dict(item.split("=", 1) for item in (path / "environ").read_text().split("\0") if "=" in item)
        except OSError:
            continue
        if "RANK" in env:
            found[int(path.name)] = int(env["RANK"])
    above = {pid: parents.get(parents.get(pid, 0), 0) for pid in found}
    return {number: pid for pid, number in found.items() if root in (above[pid], parents[pid])}


def ended(directory: Path) -> dict:
    return json.loads((directory / "exit.json").read_text())


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on_by_itself(data, tmp_path):
    words = tiny(data, "parallel.ep=2", "nproc=null", "train.steps=12")
    command = (*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "2", "-m", "turnout.launch.train")
    process = start(*command, *words, cwd=tmp_path)
    wait_for(lambda: any(lines(found) >= 5 for found in tmp_path.glob("runs/*")), process)
    os.kill(ranks_below(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    (directory,) = (tmp_path / "runs").iterdir()
    assert [row["step"] for row in rows(directory)] == list(range(1, 13))
    assert "step      1  loss" in output
    assert output.count("step      1  loss") == 1, "it went on from a checkpoint"
    assert ended(directory)["code"] == 0
    whole = tmp_path / "whole"
    assert ends(start_ranks(as_rank, 2, str(whole), [*words, "nproc=2"])) == [0, 0]
    assert fingerprint(directory, 12) == fingerprint(whole, 12)


def as_rank(directory: str, words: list[str]) -> int:
    """What a process of a run does, without torchrun."""
    path = Path(directory)
    path.mkdir(exist_ok=True)
    return rank.main(path, compose(words, world=int(os.environ.get("WORLD_SIZE", "1"))).config, launched=False)


@pytest.mark.full
def test_torchrun_does_not_repeat_an_ending_that_is_final(data, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": 3}\n')
    command = (*TORCHRUN, "--nproc-per-node", "1", "--max-restarts", "2", "-m", "turnout.launch.train")
    result = run(*command, *tiny(broken, "nproc=null", f"run={tmp_path / 'run'}"))
    assert result.returncode == 1, "torchrun's own code"
    assert ended(tmp_path / "run")["code"] == 3
    assert result.stdout.count("turnout: ") == 1, "the two restarted ranks ended at once"


def test_only_a_directory_of_the_same_torchrun_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for name in ("runs/1", "runs/2", "runs/3", "mine"):
        Path(name).mkdir(parents=True)
    assert elastic.earlier(None) is None
    for name in ("runs/1", "runs/2", "mine"):
        elastic.mark(Path(name))
    assert elastic.earlier(None) == Path("runs/2")
    assert elastic.earlier("mine") == Path("mine")
    assert elastic.earlier("runs/3") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert elastic.earlier("mine") is None
    assert elastic.final(Path("mine")) is None
    for code, last in ((2, 2), (3, 3), (143, 143), (5, None), (6, None), (1, None), (4, None)):
        Path("mine/exit.json").write_text(json.dumps({"code": code}))
        assert elastic.final(Path("mine")) == last


@pytest.mark.full
def test_a_hanging_rank_is_named_and_ended_and_sigterm_then_saves_nothing(data, tmp_path):
    words = tiny(data, "nproc=2", f"run={tmp_path / 'run'}", "train.steps=100000", "parallel.timeout=4")
    process = start(*TURNOUT, *words)
    wait_for(lambda: lines(tmp_path / "run") >= 3, process)
    stopped = ranks_below(process.pid)[1] if 1 in ranks_below(process.pid) else ranks_below_agent(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.2)
    before = committed(tmp_path / "run" / "checkpoints")
    process.send_signal(signal.SIGTERM)  # no vote will come
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 5, output
    told = ended(tmp_path / "run")
    assert told["code"] == 5
    assert f"rank 1 (process {stopped} on " in told["ranks"]["0"]["reason"]
    assert "does not answer" in told["ranks"]["0"]["reason"]
    assert told["ranks"]["1"]["code"] == 5
    assert not Path(f"/proc/{stopped}").exists(), "an orphan"
    assert committed(tmp_path / "run" / "checkpoints") == before


def ranks_below_agent(root: int) -> dict[int, int]:
    """The ranks of a torchrun agent that `turnout train` started."""
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    return next(found for child in children if (found := ranks_below(int(child))))


def test_a_model_that_can_not_be_written_ends_all_ranks_with_6(data, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "tmp-model").write_text("in the way")
    began = time.monotonic()
    children = start_ranks(as_rank, 2, str(directory), tiny(data, "nproc=2", "train.steps=2"))
    assert ends(children) == [6, 6]
    assert time.monotonic() - began < 60, "the others did not wait for the time-out"
    told = ended(directory)
    assert told["code"] == 6
    assert "model can not be written" in str(told)
    assert (directory / "checkpoints" / "step-00000002").is_dir(), "nothing is lost"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_of_them_with_143_and_saved(data, tmp_path, number):
    words = tiny(data, "nproc=2", "train.steps=100000", "train.save_every=null", "train.async_save=true")
    directory = tmp_path / "run"
    children = start_ranks(as_rank, 2, str(directory), words)
    while lines(directory) < 3:
        assert all(child.is_alive() for child in children)
        time.sleep(0.02)
    os.kill(children[1].pid, number)
    assert ends(children) == [143, 143]
    told = ended(directory)
    assert {entry["code"] for entry in told["ranks"].values()} == {143}
    step = rows(directory)[-1]["step"]
    assert [saved for saved, _ in committed(directory / "checkpoints")] == [step]
    assert told["ranks"]["1"]["reason"] == f"asked to stop: saved at step {step}"


def empty_file(directory: Path, data: Path) -> tuple[Path, str]:
    (directory / "empty.jsonl").write_text("")
    return directory / "empty.jsonl", "empty.jsonl (split train) holds no text"


def not_utf8(directory: Path, data: Path) -> tuple[Path, str]:
    (directory / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe4"}\n')
    return directory / "latin.jsonl", "latin.jsonl (byte 24) is not UTF-8"


def _cached(directory: Path, data: Path) -> tuple[Path, Path]:
    """A copy of the corpus, and the token stream that a run made of it."""
    copy = directory / data.name
    copy.write_bytes(data.read_bytes())
    assert ends([fork(as_rank, str(directory / "first"), tiny(copy, "train.steps=1"))]) == [0]
    (stream,) = directory.glob("train-*.tokens")
    return copy, stream


def bit_flip(directory: Path, data: Path) -> tuple[Path, str]:
    copy, stream = _cached(directory, data)
    raw = bytearray(stream.read_bytes())
    raw[1000] ^= 4
    stream.write_bytes(raw)
    return copy, f"{stream.name} is corrupt (sha256 "


def token_beyond_the_vocabulary(directory: Path, data: Path) -> tuple[Path, str]:
    import hashlib

    copy, stream = _cached(directory, data)
    raw = bytearray(stream.read_bytes())
    raw[1000:1002] = (400).to_bytes(2, "little")
    stream.write_bytes(raw)
    about = json.loads(stream.with_suffix(".json").read_text())
    stream.with_suffix(".json").write_text(json.dumps({**about, "sha256": hashlib.sha256(raw).hexdigest()}))
    return copy, f"{stream.name} (offset 500) has token 400, vocabulary 400"


@pytest.mark.parametrize("fault", [empty_file, not_utf8, bit_flip, token_beyond_the_vocabulary])
def test_bad_data_ends_a_run_with_3_naming_file_and_place(data, tmp_path, fault):
    path, message = fault(tmp_path, data)
    directory = tmp_path / "run"
    assert ends([fork(as_rank, str(directory), tiny(path))]) == [3]
    told = ended(directory)
    assert told["code"] == 3
    assert message in told["ranks"]["0"]["reason"]
    assert not (directory / "metrics.jsonl").exists()


def test_the_network_of_wandb_may_be_down(data, tmp_path):
    """A key, and a server that nobody runs: the run neither stops nor waits for it, and keeps its numbers."""
    words = tiny(data, "log.wandb=true", f"run={tmp_path / 'run'}")
    env = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    result = run(*TURNOUT, *words, env=env)
    assert result.returncode == 0, result.stdout
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert "is left out" not in result.stdout
