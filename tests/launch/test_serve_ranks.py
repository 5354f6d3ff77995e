"""`turnout serve` on two ranks: real processes, real HTTP, and what becomes of them when one of them is lost."""
# ruff: noqa: N802 (G3 is the name of a rule)

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from turnout.launch.main import main
from turnout.tests.helpers.processes import PARENT, processes_with

START, FAIL, END = 120.0, 2.0, 30.0  # seconds: until ready, until requests have failed, until nothing is left


@dataclass
class Serving:
    """A server and its ranks, and what it has printed once it has ended."""

    process: subprocess.Popen[str]
    url: str
    ranks: dict[int, int]
    log: Path

    def stream(self, max_tokens: int) -> list[str]:
        """The frames of one streamed completion, as far as they came."""
        body = {"model": "first", "prompt": "The list", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        frames = []
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            frames += [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        return frames

    def post(self, max_tokens: int, prompt: str | list[int] = "The list") -> httpx.Response:
        body = {"model": "first", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def ask(self, stream: bool) -> tuple[float, str]:
        """When a long request ended, and what it was told; nobody knows whether it ran or waited."""
        body = {"model": "first", "prompt": "The list", "max_tokens": 8000, "stream": stream, "ignore_eos": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code in ((200, 503) if stream else (503,))
        return time.monotonic(), answer.text

    def health(self) -> list[int]:
        """What the probe says, until nobody answers."""
        seen = []
        with httpx.Client() as client, contextlib.suppress(httpx.TransportError):
            while True:
                seen.append(client.get(f"{self.url}/health").status_code)
                time.sleep(0.05)
        return seen

    def running(self) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return float(next(line for line in text.splitlines() if line.startswith("turnout:num_requests_run")).split()[1])

    def sent(self) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return float(
            next(line for line in text.splitlines() if line.startswith("turnout:all_to_all_bytes_total")).split()[1]
        )

    def end(self) -> tuple[int, str]:
        """Exit code and last line, when no process is left."""
        code = self.process.wait(END)
        deadline = time.monotonic() + END
        while any(map(alive, self.ranks.values())):
            assert time.monotonic() < deadline, "a rank is left"
            time.sleep(0.02)
        return code, self.log.read_text().rstrip().splitlines()[-1]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ranks_of(parent: int) -> dict[int, int]:
    """Rank → process id, of the ranks that `parent` has started."""
    found = {}
    for pid in processes_with(PARENT, parent):
        with contextlib.suppress(OSError, KeyError):
            text = Path(f"/proc/{pid}/environ").read_text()
            found[int(dict(item.split("=", 1) for item in text.split("\0") if "=" in item)["RANK"])] = pid
    return found


TURNOUT = ("-m", "turnout", "serve")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "turnout.launch.serve")


@pytest.fixture
def start(checkpoint, tmp_path) -> Iterator[Callable[..., Serving]]:
    processes = []

    def begin(*settings: str, by: tuple[str, ...] = TURNOUT) -> Serving:
        ready, log = tmp_path / "ready.json", tmp_path / "log"
        command = [sys.executable, *by, str(checkpoint), "port=0", f"json={ready}", *settings]
        with log.open("w") as output:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=env)
        processes.append(process)
        deadline = time.monotonic() + START
        while not ready.exists() or not ready.read_text().endswith("}\n"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return Serving(process, json.loads(ready.read_text())["url"], ranks_of(process.pid), log)

    yield begin
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def load(serving: Serving, pool: ThreadPoolExecutor, max_tokens: int) -> tuple[list[Future], list[Future]]:
    """Streams and whole answers that run now, on both replicas."""
    streams = [pool.submit(serving.stream, max_tokens) for _ in range(3)]
    answers = [pool.submit(serving.post, max_tokens) for _ in range(2)]
    deadline = time.monotonic() + 30
    while serving.running() < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return streams, answers


def assert_failed(streams: list[Future], answers: list[Future]) -> None:
    """Every request has one terminal error, and no [DONE]."""
    for stream in streams:
        *_, last = stream.result(0)
        assert json.loads(last)["error"]["code"] == "unavailable"
    for answer in answers:
        assert answer.result(0).status_code == 503


def wait_for(requests: list[Future], seconds: float) -> float:
    begun = time.monotonic()
    while not all(request.done() for request in requests):
        assert time.monotonic() - begun < seconds, "requests still wait"
        time.sleep(0.01)
    return time.monotonic() - begun


LAYOUTS = [("nproc=2", "parallel.ep=2"), pytest.param(("nproc=2", "parallel.tp=2"), marks=pytest.mark.full)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_G3_a_killed_rank_fails_what_runs_within_2_s_and_the_server_says_which(start, pool, layout):
    serving = start(*layout)
    assert sorted(serving.ranks) == [0, 1]
    streams, answers = load(serving, pool, 8000)
    os.kill(serving.ranks[1], signal.SIGKILL)
    wait_for(streams + answers, FAIL)
    assert_failed(streams, answers)
    code, last = serving.end()
    assert code == 5
    assert last.startswith(f"turnout: rank 1 (process {serving.ranks[1]} on ")
    assert last.endswith("is gone or hangs: see its log")


@pytest.mark.full
def test_G3_a_rank_killed_under_load_ends_what_runs_and_what_waits_and_its_health(start):
    serving = start("nproc=2", "parallel.ep=2", "max_num_seqs=4")
    with ThreadPoolExecutor(33) as pool:
        health = pool.submit(serving.health)
        requests = [pool.submit(serving.ask, bool(i % 3)) for i in range(32)]
        deadline = time.monotonic() + 30
        while serving.running() < 8:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed = time.monotonic()
        os.kill(serving.ranks[1], signal.SIGKILL)
        for request in requests:
            ended, text = request.result(30)
            assert ended - killed < FAIL
            assert '"code":"unavailable"' in text
            assert "[DONE]" not in text
        assert health.result(30)[0] == 200
        assert health.result()[-1] == 503
    code, last = serving.end()
    assert code == 5
    assert last.startswith(f"turnout: rank 1 (process {serving.ranks[1]} on ")


def test_G3_sigterm_lets_all_ranks_finish_what_runs_and_leaves_nothing(start, pool):
    serving = start("nproc=2", "parallel.ep=2")
    assert serving.sent() == 0, "also after the warm-up"
    assert serving.post(1, prompt=list(range(3, 200))).status_code == 200
    assert serving.sent() > 0
    streams, answers = load(serving, pool, 60)
    serving.process.send_signal(signal.SIGTERM)
    for stream in streams:
        *_, last, done = stream.result(60)
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
    assert [answer.result(60).json()["usage"]["completion_tokens"] for answer in answers] == [60, 60]
    assert serving.end() == (0, "stopped")


@pytest.mark.full
def test_G3_a_hanging_rank_fails_what_runs_within_seconds(start, pool):
    serving = start("nproc=2", "parallel.ep=2")
    streams, answers = load(serving, pool, 8000)
    os.kill(serving.ranks[1], signal.SIGSTOP)
    wait_for(streams + answers, 10.0)
    assert_failed(streams, answers)
    code, last = serving.end()
    assert code == 5
    assert last.startswith(f"turnout: rank 1 (process {serving.ranks[1]} on ")


@pytest.mark.full
def test_G3_a_rank_that_is_lost_while_nothing_runs_is_missed_too(start):
    serving = start("nproc=2", "parallel.ep=2")
    time.sleep(1.0)
    os.kill(serving.ranks[1], signal.SIGKILL)
    code, last = serving.end()
    assert code == 5
    assert last.startswith(f"turnout: rank 1 (process {serving.ranks[1]} on ")


@pytest.mark.full
def test_G3_without_rank_0_no_rank_is_left(start, pool):
    serving = start("nproc=2", "parallel.ep=2")
    streams, answers = load(serving, pool, 8000)
    os.kill(serving.ranks[0], signal.SIGKILL)
    wait_for(streams + answers, FAIL)
    assert all(isinstance(request.exception(), httpx.TransportError) for request in streams + answers)
    assert serving.end() == (5, f"turnout: rank 0 (process {serving.ranks[0]}) was ended by SIGKILL")


@pytest.mark.full
def test_G3_ranks_end_with_the_process_that_started_them(start):
    serving = start("nproc=2", "parallel.ep=2")
    serving.process.kill()
    deadline = time.monotonic() + END
    while any(map(alive, serving.ranks.values())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.full
def test_G3_a_second_signal_ends_all_ranks_at_once(start, pool):
    serving = start("nproc=2", "parallel.ep=2")
    load(serving, pool, 8000)
    serving.process.send_signal(signal.SIGTERM)
    while httpx.get(f"{serving.url}/ready").status_code == 200:
        time.sleep(0.02)
    serving.process.send_signal(signal.SIGTERM)
    assert serving.end()[0] == 128 + signal.SIGTERM


@pytest.mark.full
def test_G3_under_torchrun_a_lost_rank_ends_all(start, pool):
    serving = start("parallel.ep=2", by=TORCHRUN)
    streams, answers = load(serving, pool, 8000)
    os.kill(serving.ranks[1], signal.SIGKILL)
    wait_for(streams + answers, FAIL)
    assert_failed(streams, answers)
    assert serving.end()[0] == 1, "torchrun's own code"
    assert f"turnout: rank 1 (process {serving.ranks[1]} on " in serving.log.read_text()


@pytest.mark.full
def test_two_ranks_write_what_one_writes(checkpoint, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [str(checkpoint), "prompt=The list", "temperature=0", "max_tokens=20", "ignore_eos=true"]
    texts = []
    for layout in ((), ("nproc=2", "parallel.ep=2"), ("nproc=2", "parallel.tp=2")):
        assert main(["generate", *words, *layout]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0]
    assert texts == texts[:1] * 3


SCRIPT = """
import os
import sys
from turnout import LLM, SamplingParams

llm = LLM(sys.argv[1], parallel={"ep": int(os.environ.get("WORLD_SIZE", "1"))})
for _ in range(2):
    found = llm.generate(["The list", "The things"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    print([output.outputs[0].text for output in found], flush=True)
"""


@pytest.mark.full
def test_a_program_under_torchrun_goes_on_on_rank_0_alone(checkpoint, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    told = []
    for by in ((), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")):
        command = [sys.executable, *by, str(script), str(checkpoint)]
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=START)
        assert result.returncode == 0, result.stderr
        told.append(result.stdout.splitlines())
    assert told[0] == told[1]
    assert len(told[0]) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["nproc=0"], "nproc (0) must be at least 1"),
        (["nproc=2", "parallel.pp=2"], "parallel.pp (2) divides training's work, not a server's"),
        (["nproc=2", "parallel.cp=2"], "parallel.cp (2) divides training's work"),
        (["nproc=2", "parallel.fsdp=true"], "parallel.fsdp (True) divides what training holds"),
        (["nproc=3", "parallel.tp=2"], "parallel.tp (2) must fit the ranks"),
        (["nproc=3", "parallel.ep=2"], "parallel.ep (2) must divide the data-parallel ranks (3)"),
        (["parallel.ep=2"], "parallel.ep (2) must divide the data-parallel ranks (1)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["serve", "generate"])
def test_a_layout_that_can_not_be_is_refused_before_anything_starts(verb, settings, says, capsys):
    assert main([verb, "x", *(["prompt=a"] if verb == "generate" else []), *settings]) == 2
    assert says in capsys.readouterr().err
