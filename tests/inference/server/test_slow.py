"""Clients that stall, in whatever phase: they lose their connection, and nobody else loses anything."""

import asyncio
import json
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from turnout.inference.server.connection import REFUSED
from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, Running, run_server
from .raw import HOST, JSON, connect, converse, get, post, read_answer, sized

STALLED = {
    "nothing at all": b"",
    "half a line": b"GET /hea",
    "half a head": get()[:-2],
    "a head and half": get()[:-2] + b"X-A: ",
}


def tasks(served: Running) -> int:
    """Of the server's own: those that answer something."""
    return sum(task.get_coro().__qualname__ == "Exchange.run" for task in asyncio.all_tasks(served.loop))


def connections(served: Running) -> int:
    return len(served.server.connections.open)


@pytest.fixture(scope="module")
def hasty(model, byte_level):
    """A server without patience, but with enough for a client on a busy machine."""
    settings = {"header_seconds": 0.5, "body_seconds": 0.5, "idle_seconds": 0.5}
    with run_server(model, byte_level, settings) as running:
        yield running


def test_a_head_that_stalls_is_closed_without_a_word_and_never_was_a_request(hasty):
    with ExitStack() as stack:
        clients = {name: stack.enter_context(connect(hasty.url)) for name in STALLED}
        for name, client in clients.items():
            client.sendall(STALLED[name])
        assert tasks(hasty) == 0
        assert {name: client.recv(1000) for name, client in clients.items()} == dict.fromkeys(STALLED, b"")


def test_a_head_that_trickles_is_closed_as_well(hasty):
    with connect(hasty.url) as client:
        begin = time.monotonic()
        while not select.select([client], [], [], 0.01)[0]:
            client.sendall(b"a")
            assert time.monotonic() - begin < 20, "every byte bought it more time"


def test_a_connection_kept_open_is_closed_after_a_while(hasty):
    with connect(hasty.url) as client:
        client.sendall(get())
        assert read_answer(client, bytearray()).status == 200
        assert client.recv(1000) == b""


BEGUN = {
    "nothing of a length": post(b"Content-Length: 1000", body=b""),
    "some of a length": post(b"Content-Length: 1000", body=b'{"model"'),
    "no chunk": post(b"Transfer-Encoding: chunked", body=b""),
    "half a chunk": post(b"Transfer-Encoding: chunked", body=b"1000\r\nhalf"),
    "no last chunk": post(b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\n"),
}


def test_a_body_that_stalls_is_408(hasty):
    with ThreadPoolExecutor(len(BEGUN)) as pool:
        for found, closes in pool.map(lambda data: converse(hasty.url, data, 1), BEGUN.values()):
            assert (found[0].status, found[0].error["code"], closes) == (408, "request_timeout", True)


def test_a_body_that_trickles_is_408(hasty):
    with connect(hasty.url) as client:
        client.sendall(post(b"Content-Length: 4000000", body=b""))
        begin = time.monotonic()
        while not select.select([client], [], [], 0.01)[0]:
            client.sendall(b" ")
            assert time.monotonic() - begin < 20, "every byte bought it more time"
        assert read_answer(client, bytearray()).status == 408


def test_a_long_body_has_more_time_as_long_as_it_comes(serve):
    served = serve(server={"body_seconds": 1.0})
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 1}).encode() + b" " * 700_000
    with connect(served.url) as client:
        client.sendall(post(sized(body), body=b""))
        for start in range(0, len(body), 70_000):
            time.sleep(0.13)
            client.sendall(body[start : start + 70_000])
        assert read_answer(client, bytearray()).status == 200


def test_a_body_of_a_request_that_is_answered_is_not_waited_for(hasty):
    with connect(hasty.url) as client:
        client.sendall(get(b"/nothing", b"Content-Length: 1000"))
        ahead = bytearray()
        assert read_answer(client, ahead).status == 404
        assert read_answer(client, ahead) is None


def test_two_hundred_slow_senders_keep_nobody_out(serve):
    served = serve(server={"max_connections": 50, "header_seconds": 60.0})
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(served.url)) for _ in range(200)]
        for client in slow:
            with_reset(client, b"GET /health HTTP/1.1\r\nX-A: ")
        assert eventually(lambda: len(select.select([c for c in slow if c.fileno() >= 0], [], [], 0)[0]) >= 140)
        assert served.get("/health").status_code == 200
        assert served.post(prompt="x", max_tokens=2).json()["usage"]["completion_tokens"] == 2
        assert connections(served) <= 50
        assert eventually(lambda: tasks(served) == 0), "that of the answer ends just after it"
    assert eventually(lambda: connections(served) <= 1)


def with_reset(client: socket.socket, data: bytes) -> None:
    """Send, to a server that may have closed already."""
    try:
        client.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        client.close()


def test_as_many_calls_as_there_may_be_connections_refuse_the_next(serve):
    served = serve(server={"max_connections": 2})
    served.engine.gate.clear()
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 1}).encode()
    with ExitStack() as stack:
        one, other = (stack.enter_context(connect(served.url)) for _ in range(2))
        for client in (one, other):
            client.sendall(post(sized(body), body=body))
        assert eventually(lambda: tasks(served) == 2)
        (answer,), closes = converse(served.url, b"", 1)
        assert (answer.status, answer.error["code"], closes) == (503, "unavailable", True)
        assert int(answer.headers["retry-after"]) > 0
        crowd = [stack.enter_context(connect(served.url)) for _ in range(3 * REFUSED)]
        said = [client.recv(1000) for client in crowd]
        assert any(b" 503 " in text for text in said)
        assert b"" in said, "so many are not even told"
        served.engine.gate.set()
        assert [read_answer(client, bytearray()).status for client in (one, other)] == [200, 200]
    assert eventually(lambda: connections(served) == 0)
    assert served.get("/health").status_code == 200


def open_stream(served: Running, body: bytes) -> socket.socket:
    """A stream to a client whose own buffer is small, with nothing read yet."""
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect((host, int(port)))
    lines = (b"POST /v1/completions HTTP/1.1", HOST, JSON, sized(body))
    client.sendall(b"\r\n".join((*lines, b"", body)))
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_stops_costs_a_bounded_buffer_and_soon_nothing(serve, stream):
    served = serve(server={"stall_seconds": 0.2, "stream_buffer_bytes": 4096}, max_num_seqs=64, num_blocks=1024)
    served.engine.pace = 0.001
    many, long = (4, 240) if stream else (1, 60)
    fields = {"prompt": [[5, 6, 7]] * many, "n": 8, "max_tokens": long, "logprobs": 5, "ignore_eos": True}
    with open_stream(served, json.dumps({"model": NAME, "stream": stream} | fields).encode()) as client:
        assert eventually(lambda: served.engine.stats().usage > 0)
        if stream:
            assert eventually(lambda: buffered(served) > 4096)
            most = 0
            while served.server.service.calls:
                most = max(most, buffered(served))
            assert most < 64 * 4096, "a step's frames at most, whatever the client does"
            steps = served.engine.stats().steps
            assert eventually(served.idle)
            assert served.engine.stats().steps <= steps + 2
        assert eventually(lambda: connections(served) == 0), "and the socket is gone, though nobody reads"
        client.recv(1)
    outcomes = served.metrics()
    assert outcomes["requests_total{outcome=abort}"] == (4 if stream else 0)
    assert eventually(lambda: tasks(served) == 0)


def buffered(served: Running) -> int:
    """Bytes that wait in the server for a client."""
    return sum(one._transport.get_write_buffer_size() for one in served.server.connections.open.copy())
