"""An answer means the same however the network has cut it; what breaks the rules is an outcome."""

import asyncio
import json

import pytest

from turnout.launch.benches.wire import MARKS, Reply
from turnout.tests.launch.benches.scripted import DONE, EVENTS, frame, plain, usage

CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(*parts: bytes) -> bytes:
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def chat(text: str) -> bytes:
    return frame(choices=[{"delta": {"content": text}, "finish_reason": None}])


def heard(*parts: bytes, endpoint: str = "completions") -> Reply:
    """What is made of parts that come at 1, 2, 3, ... and the connection's end."""

    async def run() -> Reply:
        ticks = iter(range(1, 10_000))
        reply = Reply(lambda: float(next(ticks)), MARKS[endpoint])
        for part in parts:
            reply.data_received(part)
        reply.connection_lost(None)
        await reply.ended
        return reply

    return asyncio.run(run())


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
@pytest.mark.parametrize(
    "data",
    [
        EVENTS + frame(" a") + frame(" b") + frame(" c") + usage(3) + DONE,
        chunks(frame(" a"), frame(" b") + frame(" c")[:20], frame(" c")[20:], usage(3), DONE),
        b"HTTP/1.1 100 Continue\r\n\r\n" + chunks(frame(" a"), frame(" b"), frame(" c"), usage(3)[:-1] + b"\r\n", DONE),
        EVENTS + (b": ping\n\n" + frame(" a") + frame(" b") + frame(" c") + usage(3) + DONE).replace(b"\n", b"\r\n"),
        EVENTS + b"".join(b"data:" + json.dumps({"choices": [{"text": t}]}).encode() + b"\n\n" for t in "abc")
        + usage(3) + b"data:[DONE]\n\n",
    ],
)  # fmt: skip
def test_a_stream_means_the_same_however_it_is_cut(data, size):
    reply = heard(*split(data, size))
    assert (reply.outcome, reply.failure, reply.status) == ("ok", "", 200)
    assert len(reply.times) == 3
    assert reply.times == sorted(reply.times)
    assert reply.usage == {"completion_tokens": 3, "prompt_tokens": 3}
    assert reply.end >= reply.times[-1]


def test_pieces_are_timed_as_they_come():
    reply = heard(EVENTS, frame(" a"), frame(" b") + frame(" c"), usage(3), DONE)
    assert reply.times == [2.0, 3.0, 3.0]
    assert reply.end == 5.0


def test_a_usage_that_comes_with_text_is_heard_too():
    told = {"completion_tokens": 2, "prompt_tokens": 3}
    reply = heard(EVENTS, frame(" a", usage=told | {"completion_tokens": 1}), frame(" b", usage=told), DONE)
    assert (reply.usage, reply.times) == (told, [2.0, 3.0])


def test_only_text_is_a_piece():
    role = frame(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    last = frame(choices=[{"delta": {}, "finish_reason": "stop"}])
    tool = frame(choices=[{"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": None}])
    reply = heard(EVENTS, role, chat(" a"), chat('"usage":{"error":1}'), tool, last, DONE, endpoint="chat")
    assert reply.times == [3.0, 4.0, 5.0]
    assert reply.usage is None
    assert reply.outcome == "ok"


def test_a_stream_without_done_is_whole_when_its_last_choice_says_so():
    last = frame(choices=[{"text": " b", "finish_reason": "length"}])
    assert heard(EVENTS, frame(" a"), last).outcome == "ok"
    assert heard(EVENTS, frame(" a"), frame(" b")).outcome == "broken"
    assert heard(chunks(frame(" a"), last)).outcome == "ok"
    assert heard(chunks(frame(" a"))).outcome == "broken"


@pytest.mark.parametrize(
    ("data", "outcome", "words"),
    [
        (plain(429, b'{"error": {"message": "queue full"}}', "Retry-After: 1"), "429", "queue full"),
        (plain(500, b""), "500", "answered 500"),
        (b"HTTP/1.1 503 Away\r\n\r\nlater", "503", "later"),
        (b"", "broken", "after 0 pieces"),
        (b"HTTP/1.1 200 OK\r\nContent-Ty", "broken", "after 0 pieces"),
        (EVENTS, "broken", "after 0 pieces"),
        (EVENTS + frame(" a") + frame(" b")[:30], "broken", "after 1 pieces"),
        (EVENTS + frame(" a") + frame(error={"message": "it broke"}), "error frame", "it broke"),
        (EVENTS + frame(" a") + frame(error={"message": "it broke"}) + DONE, "error frame", "it broke"),
        (EVENTS + b"data: {nonsense\n\n", "broken", "no answer of OpenAI"),
        (EVENTS + b"data: []\n\n", "broken", "no answer of OpenAI"),
        (CHUNKED + b"zz\r\n", "broken", "no answer of OpenAI"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "broken", "no answer of OpenAI"),
        (plain(200, b"<html>"), "broken", "no answer of OpenAI"),
        (plain(200, b'{"error": {"message": "no"}}'), "error frame", "no"),
        (plain(200, b"{}")[:-1], "broken", "after 0 pieces"),
    ],
)  # fmt: skip
def test_what_goes_wrong_has_its_outcome(data, outcome, words):
    for size in (1, 10_000):
        reply = heard(*split(data, size))
        assert reply.outcome == outcome
        assert words in reply.failure


def test_an_answer_in_one_piece_has_its_usage_and_no_times():
    body = json.dumps({"choices": [{"text": "abc"}], "usage": {"completion_tokens": 3}}).encode()
    whole = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body
    chunked = CHUNKED.replace(b"text/event-stream", b"application/json") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for data in (plain(200, body), whole, chunked):
        for size in (1, 10_000):
            reply = heard(*split(data, size))
            assert (reply.outcome, reply.times, reply.usage) == ("ok", [], {"completion_tokens": 3})
