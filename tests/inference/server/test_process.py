"""A server whose engine breaks, as a process: its callers, its probes and whoever started it all learn of it."""
# ruff: noqa: N802 (G3 is the name of a rule)

import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

BODY = {"model": "model", "prompt": "The list", "max_tokens": 200, "ignore_eos": True}
CALLS = [{}, {"stream": True}, {"stream": True, "n": 3}, {"n": 2}]
SECONDS = 2.0


def call(url: str, body: dict) -> tuple[float, str]:
    """When a call ended and what it said."""
    answer = httpx.post(f"{url}/v1/completions", json=BODY | body, timeout=120, trust_env=False)
    return time.monotonic(), answer.text


def probe(url: str, seen: list[int]) -> None:
    """Ask for its health until nobody answers."""
    with httpx.Client(trust_env=False) as client:
        while True:
            try:
                seen.append(client.get(f"{url}/health").status_code)
            except httpx.TransportError:
                return
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("fault", "patience", "says"),
    [
        ("crash", 0.0, "turnout: the engine crashed: RuntimeError: no such kernel: start it again"),
        ("hang", 1.0, "turnout: the engine stalled: a step took longer than watchdog_seconds (1 s)"),
    ],
)
def test_G3_a_broken_engine_ends_its_calls_its_health_and_its_process(model_dir, fault, patience, says):
    settings = [str(model_dir), "port=0", "max_num_seqs=4", "watchdog_seconds=1", "served_model_name=model"]
    command = [sys.executable, "-m", "turnout.tests.helpers.broken_serve", fault, *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = next(line for line in process.stdout if line.startswith("ready: ")).split()[1]
        health: list[int] = []
        prober = threading.Thread(target=probe, args=(url, health))
        prober.start()
        with ThreadPoolExecutor(len(CALLS)) as pool:
            answers = list(pool.map(lambda body: call(url, body), CALLS))
        prober.join(60)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    broke = float(re.search(r"fault: (\S+)", output)[1])
    for ended, text in answers:
        assert ended - broke < patience * 1.5 + SECONDS
        assert '"code":"unavailable"' in text
        assert "[DONE]" not in text
        assert "kernel" not in text
    assert health[0] == 200
    assert health[-1] == 503
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith(says)
    assert "in forward" in output, "the traceback, or the stacks"
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections of ours may linger
        listener.bind(("127.0.0.1", int(url.rpartition(":")[2])))
