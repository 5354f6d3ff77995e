"""How a server ends, whatever it is doing: its exit code, its last line, what its clients get, and what is left."""
# ruff: noqa: N802 (G3 is the name of a rule)

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from turnout.tests.helpers.processes import SESSION, processes_with

END = 60.0  # seconds that bound a failing test
ENDLESS = {"prompt": "The list", "max_tokens": 3000, "ignore_eos": True}
CALLS = {
    "idle": [],
    "streaming": [ENDLESS | {"stream": True}],
    "queued": [ENDLESS | {"stream": True}, ENDLESS, ENDLESS | {"stream": True}],
    "prefill": [ENDLESS | {"prompt": [5] * 3000, "max_tokens": 9}],
}
RUNNING = {"idle": (0, 0), "streaming": (1, 0), "queued": (1, 2), "prefill": (1, 0)}
SHARED = "/dev/shm"  # noqa: S108  (what programs share, not a file of ours)
ENDS = ("SIGTERM", "SIGINT", "SIGTERM twice", "crash")


@dataclass
class Serving:
    """A server in slow motion, a process group of its own."""

    process: subprocess.Popen[str]
    fault: Path
    lines: list[str]

    def wait_for(self, start: str) -> str:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(start):
                return line
        raise AssertionError(self.lines)

    def drain(self) -> threading.Thread:
        reader = threading.Thread(target=lambda: self.lines.extend(line.rstrip() for line in self.process.stdout))
        reader.start()
        return reader


@pytest.fixture
def start(checkpoint, tmp_path):
    processes = []

    def begin() -> Serving:
        fault = tmp_path / "fault"
        settings = ["port=0", "max_num_seqs=1", "max_num_batched_tokens=16", "drain_seconds=0.5"]
        command = [sys.executable, "-m", "turnout.tests.helpers.paced_serve", str(fault), str(checkpoint), *settings]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, text=True, env=env, start_new_session=True, **pipes)
        processes.append(process)
        return Serving(process, fault, [])

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def call(url: str, body: dict) -> tuple[int, str]:
    """Status and text, as far as they came; a connection that broke says so."""
    text = ""
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json={"model": "first"} | body, timeout=END) as answer:
            for piece in answer.iter_text():
                text += piece
            return answer.status_code, text
    except httpx.TransportError:
        return 0, text


def load(url: str) -> tuple[int, int]:
    """(running, waiting)"""
    found = {}
    for line in httpx.get(f"{url}/metrics", timeout=END).text.splitlines():
        if line.startswith("turnout:num_requests_"):
            found[line.partition("{")[0]] = int(float(line.split()[-1]))
    return found["turnout:num_requests_running"], found["turnout:num_requests_waiting"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + END
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(serving: Serving, state: str, end: str, url: str) -> None:
    """Have the server end; an idle one leaves no time between two signals."""
    if end == "crash":
        serving.fault.touch()
        return
    name = getattr(signal, end.split()[0])
    serving.process.send_signal(name)
    if end.endswith("twice"):
        if state != "idle":
            until(lambda: httpx.get(f"{url}/ready", timeout=END).status_code == 503)
        serving.process.send_signal(name)


def group_left(leader: int) -> list[int]:
    """Processes of the session that `leader` began."""
    return [pid for pid, state in processes_with(SESSION, leader).items() if state != "Z"]


def assert_answered(state: str, end: str, answers: list[Future]) -> None:
    """What the clients got."""
    for body, future in zip(CALLS[state], answers, strict=True):
        status, text = future.result(END)
        if end == "SIGTERM twice":
            assert "[DONE]" not in text
            assert status == 0
        elif end == "crash":
            assert status == (200 if body.get("stream") and text.startswith('data: {"id') else 503)
            assert '"code":"unavailable"' in text
            assert "[DONE]" not in text
        else:
            assert status == 200
            assert '"finish_reason":"abort"' in text
            assert text.endswith("data: [DONE]\n\n") == bool(body.get("stream"))


QUICK = ("prefill", "SIGTERM")
CASES = [(state, end) for state in CALLS for end in ENDS if (state, end) != ("idle", "crash")]
MATRIX = [pytest.param(*case, marks=[] if case == QUICK else [pytest.mark.full]) for case in CASES]


@pytest.mark.parametrize(("state", "end"), MATRIX)
def test_G3_whatever_it_does_a_server_ends_as_it_should_and_leaves_nothing(start, state, end):
    shared = set(os.listdir(SHARED))
    serving = start()
    url = serving.wait_for("ready: ").split()[1]
    reader = serving.drain()
    with ThreadPoolExecutor(4) as pool:
        answers = []
        for body in CALLS[state]:
            answers.append(pool.submit(call, url, body))
            until(lambda: sum(load(url)) == len(answers))
        assert load(url) == RUNNING[state]
        finish(serving, state, end, url)
        code = serving.process.wait(END)
        reader.join(END)
        assert_answered(state, end, answers)
    codes = {"SIGTERM twice": 128 + signal.SIGTERM, "crash": 1}
    assert code == codes.get(end, 0) or (state, code) == ("idle", 0)
    if end == "crash":
        assert serving.lines[-1] == "turnout: the engine crashed: RuntimeError: no such kernel: start it again"
    elif end != "SIGTERM twice":
        assert serving.lines[-1] == "stopped"
    assert group_left(serving.process.pid) == []
    assert not {name for name in set(os.listdir(SHARED)) - shared if str(serving.process.pid) in name}
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections of ours may linger
        listener.bind(("127.0.0.1", int(url.rpartition(":")[2])))


@pytest.mark.full
@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT"])
def test_G3_a_signal_while_it_loads_ends_it_cleanly(start, end):
    serving = start()
    serving.wait_for("loading ")
    reader = serving.drain()
    serving.process.send_signal(getattr(signal, end))
    assert serving.process.wait(END) == 0
    reader.join(END)
    assert group_left(serving.process.pid) == []
    assert not any("Traceback" in line for line in serving.lines), json.dumps(serving.lines)
