"""Server-sent events, and noticing that the client is gone."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NoReturn, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, api_error, to_json
from .shell import DIRECT

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"
LEAST = 0.001  # seconds between two looks at a stream

logger = logging.getLogger(__name__)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it when the client disconnects. The request's body must have been read.

    Raises:
        ApiError: 499, which nobody is left to read.
    """
    return await _unless(work, _gone(receive))


async def _unless(work: Awaitable[T], *ends: Awaitable[NoReturn]) -> T:
    """Await `work`, but cancel it as soon as one of `ends` raises, and raise that."""
    worker, others = asyncio.ensure_future(work), [asyncio.ensure_future(end) for end in ends]
    try:
        done, _ = await asyncio.wait({worker, *others}, return_when=asyncio.FIRST_COMPLETED)
        if worker not in done:
            done.pop().result()
        return worker.result()
    finally:
        for task in (worker, *others):
            task.cancel()
        await asyncio.wait({worker, *others})


async def _gone(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ApiError(499, "the client closed the connection", code="client_closed")


async def frames(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """One data frame a chunk, then `[DONE]`; or, when a chunk fails, a frame with the error and nothing after it.

    Args:
        chunks: JSON texts.
    """
    try:
        async for chunk in chunks:
            yield _frame(chunk)
    except Exception as error:
        logger.error("a stream failed: %s", error, exc_info=error)
        yield _frame(to_json(api_error(error).body()))
    else:
        yield DONE


class EventStream(Response):
    """Sends frames until they end, the client goes, or the client reads nothing for `stall` seconds.

    A frame costs no task and no timer: one task a stream looks after silence and standstill.

    Args:
        frames: what to send.
        close: called once it is over, however it ended.
        stall: seconds.
        keepalive: after so many seconds of silence a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncGenerator[bytes, None], close: Callable[[], None], stall: float, keepalive: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._frames, self._close = frames, close
        self._stall, self._keepalive = stall, keepalive
        self._sending = False
        """The client has not taken the last frame yet."""
        self._since = time.monotonic()
        """When the last frame was sent, or its sending began."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        direct = scope.get(DIRECT, send)
        try:
            await _unless(self._run(direct), _gone(receive), self._watch(direct))
        except (ApiError, TimeoutError) as error:
            logger.info("a stream was given up: %s", error or "the client stopped reading")
        finally:
            await self._frames.aclose()
            self._close()

    async def _run(self, send: Send) -> None:
        async for frame in self._frames:
            await self._send(send, frame, more=True)
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, frame: bytes, *, more: bool) -> None:
        self._sending, self._since = True, time.monotonic()
        await send({"type": "http.response.body", "body": frame, "more_body": more})
        self._sending = False

    async def _watch(self, send: Send) -> NoReturn:
        """Break silence.

        Raises:
            TimeoutError: the client has stopped reading.
        """
        while True:
            await asyncio.sleep(max(LEAST, min(self._rest(), self._stall)))
            if self._rest() > 0:
                continue
            if self._sending:
                raise TimeoutError
            async with asyncio.timeout(self._stall):
                await self._send(send, KEEPALIVE, more=True)

    def _rest(self) -> float:
        """Seconds until there is something to do if nothing happens."""
        return self._since - time.monotonic() + (self._stall if self._sending else self._keepalive)


def _frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
