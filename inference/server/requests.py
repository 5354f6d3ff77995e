"""The name of the request at hand: in its answer, in the log, in whatever runs on its behalf."""

import re
import uuid
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
SANE = re.compile(rb"[!-~](?:[ -~]{0,126}[!-~])?")
"""1 to 128 printable characters of ASCII, no blank at either end."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that this task serves; empty outside of any."""


def name_of(scope: Scope) -> bytes:
    """What a request is called: as its client has it, or a new name."""
    given = [value for name, value in scope["headers"] if name == HEADER]
    return given[0] if len(given) == 1 and SANE.fullmatch(given[0]) else fresh()


def fresh() -> bytes:
    """A name for what has none."""
    return uuid.uuid4().hex.encode()


class NameRequests:
    """Every request has an id, the client's own `X-Request-Id` where it is sane, and every answer tells it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = name_of(scope)
        request_id.set(name.decode("ascii"))

        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, name)]}
            await send(message)

        await self._app(scope, receive, naming)
