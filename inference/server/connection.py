"""One HTTP/1.1 connection, behind uvicorn's interface: from bytes to requests, and what strangers may not do to us.

A head is read whole before anything else exists: a sender who stalls there holds a socket and no more, and is the first
to go when there are too many. Every refusal is OpenAI's error object, also of what is no HTTP at all. After an answer
that ends the connection the sender may finish (`LINGER_SECONDS`), since a reset would take the answer with it.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import h11
from starlette.types import ASGIApp, Scope

from .config import ServerConfig
from .errors import ApiError
from .exchange import Exchange, Headers, bad_request, head_bytes
from .heads import Heads
from .requests import HEADER, fresh

if TYPE_CHECKING:
    import uvicorn
    from uvicorn.server import ServerState

AHEAD = 64 * 1024  # bytes of later requests that are taken while one is answered
LINGER_SECONDS = 1.0
READER_PROGRESS = 4096  # bytes that a client must take within `stall_seconds` while there is something to take
REFUSED = 64  # connections beyond the most that are told so; more are closed without a word
FILES = 512  # descriptors that are left for everything but connections
VERSIONS = (b"1.0", b"1.1")


class Connections:
    """Makes the connections of one server; uvicorn takes it for the protocol's class.

    Args:
        config: time-outs and bounds.
        count: called with the status of every answer that the application does not see.
    """

    def __init__(self, config: ServerConfig, count: Callable[[int], None]) -> None:
        self.config = config
        self.count = count
        self.most = max(1, _raise_file_limit(config.max_connections + FILES) - FILES)
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}
        """Those without a request in progress, longest first."""

    def __call__(
        self,
        config: "uvicorn.Config",
        server_state: "ServerState",
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> "Connection":
        return Connection(self, config.loaded_app, server_state)


class Connection(asyncio.Protocol):
    """Reads requests one after the other, and lets the application answer each.

    Args:
        all_of_them: what the server's connections share.
        app: the application.
        state: uvicorn's account of connections and tasks.
    """

    def __init__(self, all_of_them: Connections, app: ASGIApp, state: "ServerState") -> None:
        self._all = all_of_them
        self._config = all_of_them.config
        self._app = app
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._ends: dict[str, Any] = {}
        self._read = Heads()
        self._exchange: Exchange | None = None
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._room = asyncio.Event()
        self._room.set()

    # What asyncio and uvicorn call.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        own, peer = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
        self._ends = {"server": own[:2], "client": peer and peer[:2]}
        transport.set_write_buffer_limits(high=self._config.stream_buffer_bytes)
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._config.stream_buffer_bytes)
        self._all.open.add(self)
        self._state.connections.add(self)  # type: ignore[arg-type]  # uvicorn lists its own classes
        excess = len(self._all.open) - self._all.most
        if excess > 0 and not self._all.waiting:
            if excess > REFUSED:
                self.abort()
            else:
                self._refuse(ApiError(503, "too many connections", code="unavailable", headers={"Retry-After": "5"}))
            return
        if excess > 0:
            next(iter(self._all.waiting)).abort()
        self._wait(self._config.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        if self._exchange is not None:
            self._exchange.leave(lost=True)
        self._room.set()

    def eof_received(self) -> bool:
        """Returns whether the transport stays open for the answer at hand."""
        if self._exchange is None or self._exchange.complete:
            self._close()
            return False
        self._exchange.leave(lost=False)
        return True

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        if self._exchange is not None and not self._exchange.whole:
            self._feed(data)
        else:
            if not self._read and self._exchange is None:
                self._set_timer(self._config.header_seconds, self.abort)
            self._read.add(data)
            if self._exchange is not None and len(self._read) > AHEAD:
                self.pause_reading()
        self._go_on()

    def pause_writing(self) -> None:
        self._room.clear()
        self._watch_stall()

    def resume_writing(self) -> None:
        self._room.set()

    def shutdown(self) -> None:
        """The server ends: so do we, after the answer at hand."""
        if self._exchange is None or self._exchange.complete:
            self._close()
        else:
            self._exchange.close = True

    # What an exchange calls.

    @property
    def common_headers(self) -> Headers:
        return self._state.default_headers

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    async def drained(self) -> None:
        if not self._room.is_set():
            await self._room.wait()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def abort(self) -> None:
        self._forget()
        self._transport.abort()

    def answered(self, exchange: Exchange) -> None:
        self._state.total_requests += 1
        if exchange.close:
            self._end(rude=not exchange.whole or bool(self._read))
        elif not exchange.whole:
            self._set_timer(LINGER_SECONDS, self._close)
        self.resume_reading()
        self._loop.call_soon(self._go_on)  # not from within the answer of the last one

    # Reading.

    def _go_on(self) -> None:
        """Begin the next request if the last one is over and the head of a new one is here."""
        while not self._ending and not self._transport.is_closing():
            if self._exchange is not None:
                if not (self._exchange.whole and self._exchange.complete):
                    return
                self._exchange = None
                self._wait(self._config.header_seconds if self._read else self._config.idle_seconds)
            try:
                head = self._read.take()
                if head is None:
                    return
                self._begin(head)
            except ApiError as error:
                self._refuse(error)
            except h11.RemoteProtocolError as error:
                self._refuse(bad_request(error))

    def _begin(self, head: bytes) -> None:
        """Start the exchange of a request.

        Raises:
            RemoteProtocolError, ApiError: the head is none.
        """
        reader = h11.Connection(h11.SERVER)
        reader.receive_data(head)
        request = reader.next_event()
        assert isinstance(request, h11.Request)
        if request.http_version not in VERSIONS:
            raise ApiError(400, "only HTTP/1.1 and HTTP/1.0 are served", code="invalid_http")
        self._set_timer(None)
        self._all.waiting.pop(self, None)
        self._exchange = Exchange(self._scope(request), reader, self)
        self._feed(self._read.rest())
        task = self._loop.create_task(self._exchange.run(self._app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _scope(self, request: h11.Request) -> Scope:
        path, _, query = request.target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.http_version.decode(),
            "scheme": "http",
            "method": request.method.decode(),
            "root_path": "",
            "path": unquote(path.decode()),
            "raw_path": path,
            "query_string": query,
            "headers": list(request.headers),
            "state": {},
        } | self._ends

    def _feed(self, data: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        self._read.add(exchange.feed(data))
        if exchange.broken and exchange.complete:
            self._end(rude=True)

    # Ending.

    def _refuse(self, error: ApiError) -> None:
        """Answer what never becomes a request, and end."""
        self._all.count(error.status)
        answer = error.response()
        headers = [header for header in answer.raw_headers if header[0] != b"connection"] + [(HEADER, fresh())]
        self.write(head_bytes(error.status, [*self.common_headers, *headers, (b"connection", b"close")]) + answer.body)
        self._end(rude=True)

    def _end(self, *, rude: bool) -> None:
        """Close behind the last answer; a rude client has not stopped sending yet, and what it sends is dropped."""
        self._ending = True
        self._read.rest()
        if not rude:
            self._close()
            return
        self._all.waiting.pop(self, None)
        self.resume_reading()
        with contextlib.suppress(OSError):  # the client has reset the connection
            self._transport.write_eof()
        self._set_timer(LINGER_SECONDS, self._close)

    def _close(self) -> None:
        """Close once all is sent, or the client takes nothing."""
        self._ending = True
        self._watch_stall()
        self._transport.close()

    def _forget(self) -> None:
        self._all.waiting.pop(self, None)
        self._all.open.discard(self)
        self._state.connections.discard(self)

    # Time.

    def _wait(self, seconds: float) -> None:
        """For the next request."""
        self._all.waiting[self] = None
        self._set_timer(seconds, self.abort)

    def _set_timer(self, seconds: float | None, action: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None or action is None else self._loop.call_later(seconds, action)

    def _watch_stall(self) -> None:
        """From now on: abort unless the client takes what is there."""
        if self._stall is None:
            self._unsent = self._transport.get_write_buffer_size()
            self._stall = self._loop.call_later(self._config.stall_seconds, self._check_stall)

    def _check_stall(self) -> None:
        self._stall = None
        left = self._transport.get_write_buffer_size()
        if left == 0 and self._room.is_set():
            return
        if left > self._unsent - READER_PROGRESS:
            self.abort()
        else:
            self._watch_stall()


def _raise_file_limit(wanted: int) -> int:
    """Let this process open as many files, as far as the system allows; returns how many it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
