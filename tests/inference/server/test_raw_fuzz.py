"""Bytes near those of the table, in any pieces: every answer is one of ours, and nothing is left behind."""

import json
import os
import re
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turnout.tests.helpers.waiting import eventually

from .conftest import Running, run_server
from .raw import connect, get
from .test_raw import ROWS
from .test_slow import connections, tasks

SEEDS = [data for data, *_ in ROWS.values() if len(data) < 20_000]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b"0", b"-1", b"fffffffff", b"HTTP/1.1", b"GET ",
    b"Host: localhost\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"0\r\n\r\n", b"Expect: 100-continue\r\n", b"/..", b"\xff", b"%", b"{", b'"stream": true, ',
]  # fmt: skip
STATUSES = {100, 200, 400, 404, 405, 413, 414, 415, 431, 499}


@st.composite
def near_misses(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    """One to three rows with a few small changes, in pieces, and whether the client leaves without a word."""
    data = b"".join(draw(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        until = min(len(data), at + draw(st.integers(0, 12)))
        new = draw(st.sampled_from([b"", data[at:until] * 2, *TOKENS]) | st.binary(max_size=4))
        data = data[:at] + new + data[until:]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return pieces, draw(st.integers(0, 7)) == 0


def tell(url: str, pieces: list[bytes], leaves: bool) -> bytes:
    """All that comes back."""
    found = b""
    with connect(url) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                client.sendall(piece)
            if leaves:
                return b""
            client.shutdown(socket.SHUT_WR)
            while data := client.recv(65536):
                found += data
        except ConnectionError:
            pass  # the server has closed: what it said before counts
    return found


def check_answers(data: bytes) -> None:
    """Whole answers one after the other, of a status that is documented, errors in OpenAI's shape; or a stream."""
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status = int(re.match(rb"HTTP/1\.1 (\d{3}) ", head)[1])
        assert status in STATUSES, head
        if b"transfer-encoding: chunked" in head:
            assert b"text/event-stream" in head
            return
        size = int((re.search(rb"\r\ncontent-length: (\d+)", head) or [b"", b"0"])[1])
        if data.startswith(b"HTTP/1.1 ") or not data:
            continue  # an answer to HEAD
        body, data = data[:size], data[size:]
        assert len(body) == size
        if status >= 400:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
            assert size <= 4096


def sockets() -> int:
    """That this process has open."""
    names = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(name) and os.readlink(name).startswith("socket:") for name in names)


@pytest.fixture(scope="module")
def fuzzed(model, byte_level):
    with run_server(model, byte_level, {}) as running:
        yield running


def fuzz(served: Running, examples: int, *, derandomize: bool) -> None:
    check_answers(tell(served.url, [get()], False))
    assert eventually(lambda: connections(served) == 0)
    before = sockets(), threading.active_count()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )
    @given(near_misses())
    def attack(case: tuple[list[bytes], bool]) -> None:
        check_answers(tell(served.url, *case))

    attack()
    assert eventually(lambda: connections(served) == 0)
    assert eventually(lambda: tasks(served) == 0)
    assert eventually(served.idle)
    assert not served.server.connections.waiting
    assert eventually(lambda: sockets() <= before[0])
    assert threading.active_count() <= before[1] + 8, "the pool in which prompts are read"
    assert served.get("/health").status_code == 200
    served.http.close()


def test_near_misses_get_answers_and_leave_nothing(fuzzed):
    fuzz(fuzzed, 100, derandomize=True)


@pytest.mark.full
def test_thousands_of_near_misses_get_answers_and_leave_nothing(serve):
    fuzz(serve(), 5000, derandomize=False)
