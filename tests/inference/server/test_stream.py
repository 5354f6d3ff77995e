"""Frames and the ends of a stream that a socket can not show at will."""
# ruff: noqa: N802 (G5 is the name of a rule)

import asyncio
import json

import pytest

from turnout import NonFiniteError
from turnout.inference.server.stream import EventStream, frames


async def texts(*items):
    """JSON texts; an exception among them is raised, a number is slept for."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        if isinstance(item, float):
            await asyncio.sleep(item)
        else:
            yield item


def collect(*items):
    async def run():
        return [frame async for frame in frames(texts(*items))]

    return asyncio.run(run())


def test_G5_every_chunk_is_a_frame_and_done_comes_once_at_the_end():
    assert collect(b"{}", b'{"a":1}') == [b"data: {}\n\n", b'data: {"a":1}\n\n', b"data: [DONE]\n\n"]


@pytest.mark.parametrize("error", [NonFiniteError("nan"), ValueError("nan is not JSON"), KeyError("ours")], ids=repr)
def test_G5_an_error_is_a_last_frame_and_never_done(error):
    *before, last = collect(b"{}", error)
    assert before == [b"data: {}\n\n"]
    assert set(json.loads(last.removeprefix(b"data: "))["error"]) == {"message", "type", "param", "code"}


def run_stream(send, receive, *items, stall=10.0, keepalive=10.0):
    """Drive an EventStream by hand; returns how often it closed."""
    closed = []

    async def run():
        stream = EventStream(frames(texts(*items)), lambda: closed.append(True), stall, keepalive)
        await asyncio.wait_for(stream({"type": "http", "headers": []}, receive, send), 30)

    asyncio.run(run())
    return len(closed)


async def never(*_):
    await asyncio.Event().wait()


def test_G5_silence_is_filled_with_comments():
    sent = []

    async def send(message):
        sent.append(message)

    assert run_stream(send, never, b"{}", 0.2, b"{}", keepalive=0.02) == 1
    found = [message["body"] for message in sent[1:]]
    assert [found[0], *found[-3:]] == [b"data: {}\n\n", b"data: {}\n\n", b"data: [DONE]\n\n", b""]
    assert set(found[1:-3]) == {b": keep-alive\n\n"}


def test_a_client_that_does_not_take_a_comment_loses_its_stream():
    sent = []

    async def send(message):
        sent.append(message.get("body"))
        if sent[-1] == b": keep-alive\n\n":
            await never()

    assert run_stream(send, never, b"{}", 1000.0, stall=0.05, keepalive=0.01) == 1
    assert len(sent) == 3


def test_a_client_that_stops_reading_loses_its_stream():
    sent = []

    async def send(message):
        sent.append(message["type"])
        if len(sent) == 3:
            await never()

    assert run_stream(send, never, *[b"{}"] * 100, stall=0.05) == 1
    assert len(sent) == 3


def test_a_client_that_leaves_during_silence_ends_its_stream():
    async def send(message):
        pass

    async def receive():
        await asyncio.sleep(0.02)
        return {"type": "http.disconnect"}

    assert run_stream(send, receive, b"{}", 1000.0) == 1


def test_a_stream_that_ends_well_is_closed_once():
    sent = []

    async def send(message):
        sent.append(message)

    assert run_stream(send, never, b"{}") == 1
    assert sent[-1]["more_body"] is False
    assert b"".join(message.get("body", b"") for message in sent) == b"data: {}\n\ndata: [DONE]\n\n"
