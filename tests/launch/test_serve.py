"""`turnout serve` as a process: where it listens, what it prints, how signals end it."""
# ruff: noqa: N802 (G3 is the name of a rule)

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import httpx
import openai
import pytest

from turnout.launch.main import main
from turnout.launch.serve import model_name

Start = Callable[..., tuple[subprocess.Popen[str], IO[str]]]


@pytest.fixture
def start(checkpoint) -> Iterator[Start]:
    """Starts `turnout serve` and gives the process and its output."""
    processes = []

    def begin(*settings: str) -> tuple[subprocess.Popen[str], IO[str]]:
        command = [sys.executable, "-m", "turnout", "serve", str(checkpoint), "port=0", *settings]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def ready_url(output: IO[str]) -> str:
    return next(line for line in output if line.startswith("ready: ")).split()[1]


def test_G3_sigterm_lets_a_stream_finish_and_the_exit_code_is_0(start, checkpoint, tmp_path):
    process, output = start(f"json={tmp_path / 'ready.json'}", "max_num_seqs=8")
    assert output.readline().startswith(f"loading {checkpoint} ")
    assert output.readline().startswith("loaded first (import ")
    url = ready_url(output)
    written = json.loads((tmp_path / "ready.json").read_text())
    assert list(written["load_seconds"]) == ["import", "weights", "kernels", "KV cache", "warm-up"]
    assert (written["url"], written["model"], written["pid"]) == (url, "first", process.pid)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options = {
        "model": "first",
        "prompt": "The list",
        "max_tokens": 200,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**options)
    chunks = client.completions.create(**options, stream=True)
    first = next(chunks).choices[0].text
    process.send_signal(signal.SIGTERM)
    parts = [chunk.choices[0] for chunk in chunks]
    assert first + "".join(part.text for part in parts) == whole.choices[0].text
    assert parts[-1].finish_reason == "length"
    assert process.wait(60) == 0
    *requests, last = output.read().splitlines()
    assert last == "stopped"
    assert [line.split()[1:3] for line in requests] == [["INFO", "request"]] * 2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_G3_a_second_signal_ends_it_at_once(start):
    process, output = start()
    url = ready_url(output)
    body = {"model": "first", "prompt": ["a"] * 32, "n": 2, "max_tokens": 1000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGINT)
        while httpx.get(f"{url}/ready").status_code == 200:
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            list(lines)


def test_G3_a_signal_while_it_loads_ends_it_cleanly(start):
    process, output = start()
    health = re.search(r"http://\S+/health", output.readline())[0]
    while True:
        with contextlib.suppress(httpx.ConnectError):
            if httpx.get(health).status_code == 503:
                break
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_G4_a_taken_port_and_a_public_address_are_refused_before_anything_is_loaded(checkpoint, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert main(["serve", str(checkpoint), f"port={port}"]) == 2
        assert f"port ({port}) is taken" in capsys.readouterr().err
    assert main(["serve", str(checkpoint), "host=0.0.0.0"]) == 2
    assert "no api_key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["port=0"], "must be CKPT"),
        (["x", "prot=1"], "did you mean port?"),
        (["x", "max_num_seqs=0"], "max_num_seqs (0) must be at least 1"),
        (["x", "drain_seconds=soon"], "drain_seconds ('soon') must be a number"),
    ],
    ids=str,
)
def test_bad_settings_exit_with_2(args, says, capsys):
    assert main(["serve", *args]) == 2
    assert says in capsys.readouterr().err


def test_a_checkpoint_that_is_none_exits_with_6(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "port=0"]) == 6
    assert "holds no model" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["runs/first", "runs/first/model", "runs/first/"])
def test_a_run_is_called_by_its_directory(path):
    assert model_name(Path(path)) == "first"
