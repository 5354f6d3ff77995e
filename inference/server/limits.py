"""What a request must be before anybody looks at its route: one host, one reading of its body's length, a plain path,
a body that comes in time and ends in time."""

import asyncio
from collections import Counter
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServerConfig
from .errors import ApiError
from .hosts import Hosts

CLOSE = {"Connection": "close"}
ONCE = (b"host", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding", b"authorization")
BODY_PROGRESS = 65536  # bytes of a body within `body_seconds`


class Limits:
    """Refuses what two readers could read in two ways, and bodies that are too long or too slow.

    Args:
        app: what is protected.
        config: the hosts, the bounds.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._hosts = Hosts(config.host, config.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = _once(scope)
            scope = {**scope, **self._target(scope, headers)}
            _check_path(scope["path"])
            self._check_length(headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        config = self._config
        await self._app(scope, _Body(receive, config.max_body_bytes, config.body_seconds), send)

    def _target(self, scope: Scope, headers: dict[bytes, bytes]) -> dict[str, object]:
        """The path of the target, which may also be a whole URL, whose host counts as much as the header."""
        hosts, raw = [headers.get(b"host", b"")], scope["raw_path"]
        if raw[:7].lower() == b"http://":
            authority, slash, rest = raw[7:].partition(b"/")
            hosts.append(authority)
            raw = slash + rest or b"/"
        if not raw.startswith(b"/"):
            raise ApiError(400, "the target must be a path", code="invalid_url", headers=CLOSE)
        reached = scope["server"][0] if scope.get("server") else None
        for host in hosts:
            name = host.decode("latin-1")
            if not self._hosts.allow(name, reached):
                rule = f"Host ({name}) is not a name of this server: use its address, or add the name to allowed_hosts"
                raise ApiError(400, rule, code="invalid_host", headers=CLOSE)
        return {} if raw is scope["raw_path"] else {"raw_path": raw, "path": unquote(raw.decode("ascii"))}

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        if int(headers.get(b"content-length", 0)) > self._config.max_body_bytes:
            raise _too_large(self._config.max_body_bytes)


class _Body:
    """ASGI's `receive`, until the body is whole at most `limit` bytes, `BODY_PROGRESS` of them in `seconds`."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive = receive
        self._limit = limit
        self._seconds = seconds
        self._size = self._mark = 0
        self._until: float | None = None
        self._whole = False

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            ApiError: 408, 413, or 400 when the client ends before its body does.
        """
        if self._whole:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._until is None or self._size - self._mark >= BODY_PROGRESS:
            self._mark, self._until = self._size, loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            rule = f"the body did not come within {self._seconds:g} s"
            raise ApiError(408, rule, code="request_timeout", headers=CLOSE) from None
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the body ended early", code="incomplete_body", headers=CLOSE)
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise _too_large(self._limit)
        self._whole = not message.get("more_body", False)
        return message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body must not exceed {limit} bytes", code="request_too_large", headers=CLOSE)


def _once(scope: Scope) -> dict[bytes, bytes]:
    """The headers that decide something.

    Raises:
        ApiError: one is given twice, or the body's length in two ways.
    """
    found = Counter(name for name, _ in scope["headers"])
    for name in ONCE:
        if found[name] > 1:
            rule = f"the header {name.decode()} is given twice"
            raise ApiError(400, rule, code="invalid_header", headers=CLOSE)
    chunked = b"transfer-encoding" in found
    if chunked and (b"content-length" in found or scope["http_version"] == "1.0"):
        rule = "Transfer-Encoding needs HTTP/1.1 and no Content-Length"
        raise ApiError(400, rule, code="invalid_header", headers=CLOSE)
    return {name: value for name, value in scope["headers"] if name in ONCE}


def _check_path(path: str) -> None:
    """Raise ApiError for a path, after its percent codes, that another reader could take for a different one."""
    plain = path.isprintable() and "\\" not in path and "\ufffd" not in path
    if not plain or any(part in (".", "..") for part in path.split("/")):
        raise ApiError(400, "the path must be plain, without . or .. in it", code="invalid_url")
