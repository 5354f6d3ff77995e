"""A client that leaves, in whatever phase, takes nothing with it and leaves nothing behind."""
# ruff: noqa: N802 (A12 is the name of a rule)

import json
import socket

import pytest

from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, SLOW, Running


def open_call(served: Running, **body) -> socket.socket:
    """A connection with a request on its way, and nothing read yet."""
    host, port = served.url.removeprefix("http://").split(":")
    text = json.dumps({"model": NAME, "prompt": "The list", "max_tokens": 120, "ignore_eos": True} | body).encode()
    client = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    return client


def read_until(client: socket.socket, text: bytes) -> bytes:
    data = b""
    while text not in data:
        more = client.recv(65536)
        assert more, data
        data += more
    return data


CALLS = {
    "stream": {"stream": True},
    "in one piece": {"stream": False},
    "many prompts and choices": {"stream": True, "prompt": ["The list", "naïve"], "n": 3},
}


@pytest.mark.parametrize("body", CALLS.values(), ids=CALLS.keys())
def test_A12_a_client_that_leaves_frees_its_blocks_within_two_steps(serve, body):
    served = serve()
    served.engine.pace = SLOW
    client = open_call(served, **body)
    if body["stream"]:
        read_until(client, b"data: ")
    assert eventually(lambda: served.engine.stats().usage > 0)
    served.engine.gate.clear()
    client.close()
    assert eventually(lambda: not served.server.service.calls)
    steps = served.engine.stats().steps
    served.engine.pace = 0.0
    served.engine.gate.set()
    assert eventually(served.idle)
    assert served.engine.stats().steps <= steps + 2
    assert served.metrics()["requests_total{outcome=abort}"] == (2 if "prompt" in body else 1)
    assert served.metrics()["requests_total{outcome=ok}"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_A12_a_client_that_leaves_while_it_waits_is_never_run(serve, stream):
    served = serve(max_num_seqs=1)
    served.engine.pace = SLOW
    running = open_call(served, stream=True)
    assert eventually(lambda: served.engine.stats().running == 1), "two connections are read in any order"
    waiting = open_call(served, prompt=[1] * 200, max_tokens=9, stream=stream)
    assert eventually(lambda: served.engine.stats().waiting == 1)
    waiting.close()
    assert eventually(lambda: served.engine.stats().waiting == 0)
    assert served.engine.stats().running == 1
    served.engine.pace = 0.0
    assert b"[DONE]" in read_until(running, b"[DONE]")
    running.close()
    assert eventually(served.idle)
    assert served.metrics()["generation_tokens_total"] == 120


def test_A12_the_others_are_not_changed_by_it(serve):
    served = serve()
    body = {"prompt": "The list", "max_tokens": 60, "temperature": 1.3, "seed": 11}
    expected = served.post(**body).json()["choices"][0]["text"]
    served.engine.pace = SLOW / 10
    leavers = [open_call(served, stream=True, seed=i) for i in range(6)]
    for client in leavers:
        read_until(client, b"data: ")
    stays = open_call(served, **body)
    for client in leavers:
        client.close()
    head, _, text = read_until(stays, b"}}}").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(text)["choices"][0]["text"] == expected
    stays.close()
    assert eventually(served.idle)


def test_A12_a_client_that_leaves_before_its_body_is_whole_costs_nothing(served: Running, caplog):
    host, port = served.url.removeprefix("http://").split(":")
    left = "http_requests_total{route=/v1/completions,status=400}"
    before, count = served.metrics().get("requests_total{outcome=abort}"), served.metrics().get(left, 0)
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 1000\r\n\r\n{")
    assert served.post(prompt="x", max_tokens=1).status_code == 200
    assert served.metrics().get("requests_total{outcome=abort}") == before
    assert eventually(served.idle)
    assert eventually(lambda: served.metrics().get(left, 0) == count + 1)
    assert not caplog.records, "no fault of ours"
