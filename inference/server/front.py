"""Pure ASGI on both sides of a router that spreads requests over replicas of the server.

In the router's process `Front` marks requests with the beginnings of their prompts (`prefix`) and ends what a lost
replica has left unfinished: a client gets a whole answer or an error in our shape, never a stream that merely stops.
In a replica `Named` says which one it is.
"""

import asyncio
from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import MIB
from .errors import ApiError, to_json
from .prefix import marks
from .requests import HEADER, name_of

PROMPTS = ("/v1/completions", "/v1/chat/completions")
MARKS = b"x-turnout-prefix"
"""The header of a request's marks, joined by dots."""
REPLICA = b"x-turnout-replica"
"""The header of an answer that names its replica; what bears none was not said by a replica."""
OWN = frozenset(
    (HEADER, MARKS, b"serve-multiplexed-model-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
)
"""Headers that are ours to set, or that steer the router, which is not for clients."""
ROUTER = "/-/"
"""The router's own probes are below it."""
LOOK_BYTES, LOOK_SECONDS = MIB, 1.0
"""A body that is larger or slower goes on unmarked: limits on bodies are the server's."""


class Named:
    """Names the replica in every answer.

    Args:
        app: the server.
        name: the replica's.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._header = (REPLICA, name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], self._header]}
            await send(message)

        if scope["type"] == "http":
            await self._app(scope, receive, naming)
        elif scope["type"] == "lifespan":
            await _live(receive, send)


class Front:
    """What stands before the router.

    Args:
        app: the router.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(ROUTER):
            await self._app(scope, receive, send)
            return
        called = (HEADER, name_of(scope))  # one name everywhere: the router would give another
        headers = [(name, value) for name, value in scope["headers"] if name.replace(b"_", b"-").lower() not in OWN]
        headers.append(called)
        if scope["method"] == "POST" and scope["path"] in PROMPTS:
            body, receive = await _look(receive)
            headers.append((MARKS, ".".join(marks(body)).encode()))

        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [header for header in message["headers"] if header[0].lower() != HEADER]
                message = {**message, "headers": [*others, called]}
            await send(message)

        answer = _Answer(scope, receive, naming)
        await self._app({**scope, "headers": headers}, receive, answer.send)
        await answer.end()


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._started = self._ended = self._streams = False

    async def send(self, message: Message) -> None:
        """Pass on what a replica says; what the router says instead of one becomes an error of ours."""
        if self._ended:
            return
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            if REPLICA not in headers:
                await self._fail(_error(message["status"]))
                return
            self._started = True
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif not message.get("more_body", False):
            self._ended = True
        await self._send(message)

    async def end(self) -> None:
        """The router has no more to say. An unfinished answer of a known length ends with its connection."""
        if self._ended:
            return
        error = ApiError(503, "the replica was lost: try again", code="replica_lost", headers={"Retry-After": "1"})
        if not self._started:
            await self._fail(error)
        elif self._streams:
            frame = b"data: %b\n\n" % to_json(error.body())
            await self._send({"type": "http.response.body", "body": frame, "more_body": False})

    async def _fail(self, error: ApiError) -> None:
        self._ended = True
        await error.response()(self._scope, self._receive, self._send)


def _error(status: int) -> ApiError:
    """What the router means by a status of its own."""
    if status == 429:
        return ApiError(429, "too many requests wait: try again later", code="queue_full", headers={"Retry-After": "1"})
    return ApiError(503, "no replica takes requests: try again later", code="unavailable", headers={"Retry-After": "5"})


async def _look(receive: Receive) -> tuple[bytes, Receive]:
    """The body, or nothing when it is large or slow; and how to receive it all the same."""
    messages: deque[Message] = deque()
    size, more = 0, True
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            while more and size <= LOOK_BYTES:
                messages.append(await receive())
                size += len(messages[-1].get("body", b""))
                more = messages[-1].get("more_body", False)
    except TimeoutError:
        pass
    body = b"" if more or size > LOOK_BYTES else b"".join(message.get("body", b"") for message in messages)

    async def again() -> Message:
        return messages.popleft() if messages else await receive()

    return body, again


async def _live(receive: Receive, send: Send) -> None:
    """There is nothing to start or stop here."""
    kind = ""
    while kind != "lifespan.shutdown":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
