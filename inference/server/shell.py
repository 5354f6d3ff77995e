"""Pure ASGI around the framework: what must hold for every answer, whatever the route (limits.py has the bounds)."""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

OPEN = ("/health", "/ready", "/")
PAGE = "/console/"
"""The console's static files; its calls carry the key."""
DIRECT = "turnout.send"
"""In a request's scope: how to send what follows the start of an answer, past all that looks at the start only."""


class RequireKey:
    """401 for every path but the probes and the console's page unless the request carries the key.

    It is compared in constant time.

    Args:
        app: what is protected.
        key: None lets everyone in.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is None or is_open(scope["path"]) or hmac.compare_digest(_bearer(scope), self._key):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)
        await error.response()(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether everybody may ask for it."""
    return path in OPEN or path.startswith(PAGE)


def _bearer(scope: Scope) -> bytes:
    """The key that a request carries; none, which is no key, unless it does so as it should."""
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return key.strip(b" ") if scheme.lower() == b"bearer" else b""


class CountAnswers:
    """Counts every answer by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in self._routes else "other"
                self._metrics.http.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app({DIRECT: send, **scope}, receive, counting)
