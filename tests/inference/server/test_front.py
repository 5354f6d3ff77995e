"""What stands before a router, and what a replica says of itself, over real HTTP; the router is played by the app.

The whole, under Ray, is tests/launch/test_ray_serve.py.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turnout.inference.server import front
from turnout.inference.server.front import Front, Named
from turnout.inference.server.prefix import marks

PROMPT = {"prompt": "once upon a time " * 20}
NAMED = (b"x-turnout-replica", b"r1")
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream"), NAMED]}
FRAME = {"type": "http.response.body", "body": b'data: {"n":1}\n\n', "more_body": True}
Serve = Callable[[ASGIApp], httpx.Client]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A client of an application that is served on a free port."""
    with ExitStack() as stack:

        def start(app: ASGIApp) -> httpx.Client:
            config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical")
            server = uvicorn.Server(config)
            listener = config.bind_socket()
            listener.listen()
            thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            return stack.enter_context(httpx.Client(base_url=url, timeout=20, trust_env=False))

        yield start


def says(*messages: Message) -> ASGIApp:
    """A router that says this and no more."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """What came through: the headers, and the body's length."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    seen = {"size": size, "headers": {name.decode(): value.decode() for name, value in scope["headers"]}}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(seen).encode()})


def test_a_prompt_reaches_the_replica_whole_and_marked(serve):
    client = serve(Front(Named(echo, "r1")))
    answer = client.post("/v1/completions", json=PROMPT)
    assert answer.headers["x-turnout-replica"] == "r1"
    assert answer.json()["size"] == len(answer.request.content)
    assert answer.json()["headers"]["x-turnout-prefix"].split(".") == marks(answer.request.content) != []
    assert "x-turnout-prefix" not in client.post("/v1/other", json=PROMPT).json()["headers"]
    assert "x-turnout-prefix" not in client.get("/v1/models").json()["headers"]


def test_a_client_can_not_steer_the_router(serve):
    client = serve(Front(Named(echo, "r1")))
    steering = {
        "X-Turnout-Prefix": "mine", "serve_multiplexed_model_id": "m", "Serve-Multiplexed-Model-Id": "m",
        "X-Request-Timeout-Seconds": "1", "X-Request-Disconnect-Disabled": "?1", "X-Other": "stays",
    }  # fmt: skip
    seen = client.get("/v1/models", headers=steering).json()["headers"]
    assert seen["x-other"] == "stays"
    steered = [name for name in seen if "turnout" in name or "multiplexed" in name or name.startswith("x-request-")]
    assert steered == ["x-request-id"]


@pytest.mark.parametrize("given", [None, "mine", "x" * 500])
def test_a_request_has_one_name_in_the_replica_and_in_its_answer(serve, given):
    async def router(scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"X-Request-ID", b"another")]}
            await send(message)

        await echo(scope, receive, adding)

    answer = serve(Front(router)).get("/", headers={} if given is None else {"X-Request-Id": given})
    assert answer.status_code == 503, "said by no replica"
    answer = serve(Front(Named(router, "r1"))).get("/", headers={} if given is None else {"X-Request-Id": given})
    (name,) = answer.headers.get_list("x-request-id")
    assert answer.json()["headers"]["x-request-id"] == name
    assert (name == given) == (given == "mine")


def test_a_large_or_slow_body_goes_on_unmarked(serve, monkeypatch):
    monkeypatch.setattr(front, "LOOK_BYTES", 1000)
    monkeypatch.setattr(front, "LOOK_SECONDS", 0.05)
    reached = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.set()
        await echo(scope, receive, send)

    client = serve(Front(Named(app, "r1")))
    large = client.post("/v1/completions", json={"prompt": "a" * 200_000}).json()
    assert large["headers"]["x-turnout-prefix"] == ""
    assert large["size"] > 200_000
    reached.clear()

    def slowly() -> Iterator[bytes]:
        yield b'{"prompt": '
        assert reached.wait(20), "the look is over before the body is"
        yield b'"%b"}' % (b"a" * 500)

    slow = client.post("/v1/completions", content=slowly()).json()
    assert slow["headers"]["x-turnout-prefix"] == ""
    assert slow["size"] == len(b'{"prompt": ""}') + 500


def test_a_large_body_is_not_held(monkeypatch):
    monkeypatch.setattr(front, "LOOK_BYTES", 1000)
    taken: list[int] = []

    async def receive() -> Message:
        taken.append(1)
        return {"type": "http.request", "body": b"a" * 100, "more_body": len(taken) < 1000}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert len(taken) == 11, "what is over the bound ends the look"
        raise asyncio.CancelledError

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Front(app)(scope, receive, send))


def test_a_stream_that_is_cut_ends_with_an_error_and_without_done(serve):
    client = serve(Front(says(STREAM, FRAME)))
    text = client.post("/v1/completions", json=PROMPT).text
    first, last, end = text.split("\n\n")
    assert (first, end) == ('data: {"n":1}', "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_stream_that_ends_is_left_alone(serve):
    whole = [STREAM, FRAME, {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}]
    assert serve(Front(says(*whole))).post("/v1/completions", json=PROMPT).text.endswith('{"n":1}\n\ndata: [DONE]\n\n')


def test_an_answer_of_known_length_that_is_cut_breaks_off_with_its_connection(serve):
    start = {**STREAM, "headers": [(b"content-type", b"application/json"), (b"content-length", b"9"), NAMED]}
    with pytest.raises(httpx.RemoteProtocolError):
        serve(Front(says(start, FRAME))).post("/v1/completions", json=PROMPT)


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [(None, 503, "replica_lost"), (404, 503, "unavailable"), (429, 429, "queue_full"), (500, 503, "unavailable")],
)
def test_what_no_replica_answers_is_an_error_in_our_shape(serve, said, status, code):
    text = {"type": "http.response.body", "body": b"Path '/' not found.", "more_body": False}
    start = {"type": "http.response.start", "status": said, "headers": [(b"content-type", b"text/plain")]}
    answer = serve(Front(says(*([start, text] if said else [])))).post("/v1/completions", json=PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert int(answer.headers["retry-after"]) > 0
    assert "Path" not in answer.text


def test_the_routers_own_probes_pass(serve):
    body = {"type": "http.response.body", "body": b"success"}
    client = serve(Front(says({"type": "http.response.start", "status": 200, "headers": []}, body)))
    assert client.get("/-/healthz").text == "success"


def test_a_replica_answers_the_start_and_the_end_of_its_life():
    said: list[str] = []
    heard = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        return {"type": next(heard)}

    async def send(message: Message) -> None:
        said.append(message["type"])

    asyncio.run(Named(echo, "r1")({"type": "lifespan"}, receive, send))
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
