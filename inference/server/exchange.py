"""One request and its answer on a connection, as ASGI sees them.

h11 reads the body; the answer is written here, a streamed piece in one write. A body that breaks is an error that
`receive` raises: the application answers it like any other.
"""

import asyncio
import logging
from functools import cache
from http import HTTPStatus
from typing import Protocol

import h11
from starlette.types import ASGIApp, Message, Scope

from .errors import ApiError, api_error

WINDOW = 65536  # bytes of a body that are held for an application that does not read
BODILESS = (204, 304)

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]


class Line(Protocol):
    """What an exchange needs of its connection."""

    @property
    def common_headers(self) -> Headers:
        """Of every answer."""

    def write(self, data: bytes) -> None: ...
    async def drained(self) -> None:
        """Return when there is room for more."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def abort(self) -> None:
        """End the connection here and now."""

    def answered(self, exchange: "Exchange") -> None:
        """The last byte of the answer has been written."""


class Exchange:
    """Reads one request's body and writes its answer.

    Args:
        scope: ASGI's.
        reader: has read the request's head.
        line: the connection.
    """

    def __init__(self, scope: Scope, reader: h11.Connection, line: Line) -> None:
        self.whole = False
        """All of the request is here."""
        self.gone = False
        """The connection is lost."""
        self.left = False
        """The client will send no more, and is taken to have lost interest."""
        self.complete = False
        """The answer is written."""
        self.close = scope["http_version"] == "1.0" or _says_close(scope["headers"])
        """The connection ends with this answer."""
        self._scope = scope
        self._reader = reader
        self._line = line
        self._expects = reader.they_are_waiting_for_100_continue
        self._body = bytearray()
        self._delivered = False
        self._error: ApiError | None = None
        self._news = asyncio.Event()
        self._started = False
        self._chunked = False
        self._left: int | None = None
        """Bytes that the answer still has to have."""
        self._held = b""
        """The answer's head, until its body comes."""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the body; returns those behind its end."""
        if data:  # h11 takes nothing for the end
            self._reader.receive_data(data)
        try:
            while not self.whole:
                event = self._reader.next_event()
                if isinstance(event, h11.Data):
                    self._take(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    self.whole = True
                else:
                    break
        except h11.RemoteProtocolError as error:
            self.close, self._error = True, bad_request(error)
        self._news.set()
        return self._reader.trailing_data[0] if self.whole else b""

    @property
    def broken(self) -> bool:
        """What comes can not be understood any more."""
        return self._error is not None

    def leave(self, *, lost: bool) -> None:
        """The client has gone; unless the connection is lost, it still gets what is answered at once."""
        self.left = self.close = True
        self.gone = lost
        self._news.set()

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer; what it leaves unanswered ends the connection."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception as error:
            logger.error("a request failed: %s", error, exc_info=error)
            if not self._started:
                await api_error(error).response()(self._scope, self.receive, self.send)
        finally:
            if not (self.complete or self.gone):
                self._line.abort()

    async def receive(self) -> Message:
        """ASGI's.

        Raises:
            ApiError: 400, the body is not HTTP.
        """
        if self._expects and not (self.whole or self._body or self._started):
            self._line.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._expects = False
        while not (self.left or self.complete):
            if self._body or (self.whole and not self._delivered):
                body, self._body = bytes(self._body), bytearray()
                self._delivered = self.whole
                return {"type": "http.request", "body": body, "more_body": not self.whole}
            if self._error is not None:
                raise self._error
            self._line.resume_reading()
            self._news.clear()
            await self._news.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """ASGI's."""
        await self._line.drained()
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self._start(message["status"], list(message.get("headers", [])))
        else:
            self._continue(message.get("body", b""), message.get("more_body", False))

    def _take(self, data: bytes) -> None:
        if self.complete:
            return  # nobody will read it
        self._body += data
        if len(self._body) > WINDOW:
            self._line.pause_reading()

    def _start(self, status: int, headers: Headers) -> None:
        if self._started:
            raise RuntimeError("the answer was begun twice")
        self.close = self.close or self._expects or _says_close(headers)
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        empty = self._scope["method"] == "HEAD" or status in BODILESS
        endless = length is None and not empty
        chunked = endless and self._scope["http_version"] == "1.1"
        if chunked:
            headers.append((b"transfer-encoding", b"chunked"))
        if self.close and not _says_close(headers):
            headers.append((b"connection", b"close"))
        head = head_bytes(status, self._line.common_headers + headers)
        self._started, self._chunked = True, chunked
        self._left = 0 if empty else length
        if endless:
            self._line.write(head)
        else:
            self._held = head  # one write with the body

    def _continue(self, body: bytes, more: bool) -> None:
        if not self._started or self.complete:
            raise RuntimeError("a piece of an answer that is not open")
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            data = data if more else data + b"0\r\n\r\n"
        elif self._left is None:
            data = body
        elif self._scope["method"] == "HEAD":
            data = b""
        else:
            data, self._left = body, self._left - len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the answer's length is not what it said")
        if self._held or data:
            self._line.write(self._held + data if self._held else data)
            self._held = b""
        if not more:
            self.complete = True
            self._body.clear()
            self._news.set()
            self._line.answered(self)


def head_bytes(status: int, headers: Headers) -> bytes:
    """The head of an answer.

    Raises:
        RuntimeError: a header has a line break.
    """
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    if lines.count(b"\n") != len(headers) or lines.count(b"\r") != len(headers):
        raise RuntimeError("a header of the answer has a line break")
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, _phrase(status), lines)


def bad_request(error: h11.RemoteProtocolError) -> ApiError:
    """What h11 found, as the client is told it."""
    status = error.error_status_hint if error.error_status_hint == 431 else 400
    message = f"this is not HTTP/1.1 as it should be: {error}"
    return ApiError(status, message, code="invalid_http", headers={"Connection": "close"})


@cache
def _phrase(status: int) -> bytes:
    return HTTPStatus(status).phrase.encode() if status in set(HTTPStatus) else b""


def _says_close(headers: Headers) -> bool:
    values = [value for name, value in headers if name == b"connection"]
    return any(token.strip().lower() == b"close" for value in values for token in value.split(b","))
