"""Pure ASGI around the framework: what must hold for every answer, whatever the route. Limits on headers, hosts and
slow senders belong here too."""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

OPEN = ("/health", "/ready")
DIRECT = "turnout.send"
"""In a request's scope: how to send what follows the start of an answer, past all that looks at the start only."""


class RequireKey:
    """401 for every path but the probes unless the request carries the key (compared in constant time).

    Args:
        app: what is protected.
        key: None lets everyone in.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._wanted = None if key is None else b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._wanted is None or scope["path"] in OPEN or hmac.compare_digest(given, self._wanted):
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"}
        error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)
        await error.response()(scope, receive, send)


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

        await self._app({**scope, DIRECT: send}, receive, counting)
