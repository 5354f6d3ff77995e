"""What an application may do to a connection, and a connection to an application: small applications, real sockets."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from turnout.inference.server.config import ServerConfig
from turnout.inference.server.connection import Connections
from turnout.tests.helpers.waiting import eventually

from .raw import connect, get, read_answer

TEXT = (b"content-type", b"text/plain")
START = {"type": "http.response.start", "status": 200, "headers": [TEXT]}


def piece(body: bytes, more: bool = True) -> dict:
    return {"type": "http.response.body", "body": body, "more_body": more}


@contextmanager
def run_app(app: Callable, **settings) -> Iterator[tuple[str, Connections]]:
    """Serve an application on connections of ours; yields its URL."""
    connections = Connections(ServerConfig(**settings), lambda status: None)
    config = uvicorn.Config(
        app, http=connections, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def read_all(client: socket.socket) -> bytes:
    data = b""
    while more := client.recv(65536):
        data += more
    return data


async def returns(scope, receive, send):
    await send(START)
    await send(piece(b"some"))


async def raises(scope, receive, send):
    await returns(scope, receive, send)
    raise RuntimeError("ours")


async def says_more(scope, receive, send):
    await send(START | {"headers": [TEXT, (b"content-length", b"9")]})
    await send(piece(b"less", more=False))


@pytest.mark.parametrize("app", [returns, raises, says_more], ids=lambda app: app.__name__)
def test_an_answer_that_is_left_unfinished_ends_the_connection(app):
    with run_app(app) as (url, connections), connect(url) as client:
        client.sendall(get())
        data = read_all(client)
        assert not data.endswith(b"0\r\n\r\n")
        assert b"less" not in data
        assert eventually(lambda: not connections.open)


async def never_starts(scope, receive, send):
    pass


def test_no_answer_at_all_ends_the_connection():
    with run_app(never_starts) as (url, _), connect(url) as client:
        client.sendall(get())
        assert read_all(client) == b""


async def breaks_a_line(scope, receive, send):
    await send(START | {"headers": [(b"x-request-id", b"a\r\nx-b: c")]})


async def fails(scope, receive, send):
    raise ValueError("/secret/path")


@pytest.mark.parametrize("app", [breaks_a_line, fails], ids=lambda app: app.__name__)
def test_an_error_outside_the_framework_is_a_500_of_our_shape(app):
    with run_app(app) as (url, _), connect(url) as client:
        client.sendall(get() + get())
        ahead = bytearray()
        for _ in range(2):
            answer = read_answer(client, ahead)
            assert (answer.status, answer.error["code"]) == (500, "internal_error")
            assert b"secret" not in answer.body
            assert "x-b" not in answer.headers


def test_an_application_waits_for_a_reader_that_stops_and_learns_that_it_is_gone():
    sent, told = [], []

    async def floods(scope, receive, send):
        await receive()
        await send(START)
        hears = asyncio.create_task(receive())
        while not hears.done():
            await send(piece(b"x" * 1000))
            sent.append(1000)
        told.append(hears.result())

    with run_app(floods, stream_buffer_bytes=8192, stall_seconds=0.3) as (url, connections), connect(url) as client:
        client.sendall(get())
        assert eventually(lambda: bool(connections.open) and sum(sent) > 8192)
        most = 0
        while connections.open:
            most = max([most, *(one._transport.get_write_buffer_size() for one in connections.open.copy())])
        assert 0 < most < 16384
    assert told == [{"type": "http.disconnect"}]


def test_a_client_that_reads_in_time_gets_all_of_it():
    async def much(scope, receive, send):
        await send(START)
        for _ in range(2000):
            await send(piece(b"x" * 1000))
        await send(piece(b"", more=False))

    with run_app(much, stream_buffer_bytes=8192) as (url, _), connect(url) as client:
        client.sendall(get(b"/health", b"Connection: close"))
        assert read_all(client).count(b"x" * 1000) == 2000


def test_a_request_that_waits_for_another_does_not_hide_that_the_client_is_gone():
    told = threading.Event()

    async def waits(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()

    with run_app(waits) as (url, _):
        with connect(url) as client:
            client.sendall(get() + get() * 20)
        assert told.wait(20)


def test_an_old_client_is_told_the_end_by_the_end():
    async def some(scope, receive, send):
        await send(START)
        await send(piece(b"some"))
        await send(piece(b" more", more=False))

    with run_app(some) as (url, _), connect(url) as client:
        client.sendall(get(version=b"1.0"))
        head, _, body = read_all(client).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head
        assert body == b"some more"


def test_a_second_head_has_the_time_of_a_head_and_not_that_of_silence():
    async def fine(scope, receive, send):
        await send(START | {"headers": [TEXT, (b"content-length", b"0")]})
        await send(piece(b"", more=False))

    with run_app(fine, header_seconds=0.5, idle_seconds=60) as (url, _), connect(url) as client:
        client.sendall(get())
        assert read_answer(client, bytearray()).status == 200
        time.sleep(0.7)
        client.sendall(get()[:-2])
        begin = time.monotonic()
        assert client.recv(100) == b""
        assert time.monotonic() - begin < 20
