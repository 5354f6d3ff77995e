"""Server-sent events, and noticing that the client is gone."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError, api_error, to_json

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"

logger = logging.getLogger(__name__)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it when the client disconnects. The request's body must have been read.

    Raises:
        ApiError: 499, which nobody is left to read.
    """
    worker = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({worker, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ApiError(499, "the client closed the connection", code="client_closed")
        return worker.result()
    finally:
        worker.cancel()
        listener.cancel()
        await asyncio.wait({worker, listener})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def frames(chunks: AsyncGenerator[bytes, None], keepalive: float) -> AsyncGenerator[bytes, None]:
    """One data frame a chunk, then `[DONE]`; or, when a chunk fails, a frame with the error and nothing after it.

    Args:
        chunks: JSON texts.
        keepalive: after so many seconds of silence a comment is sent.
    """
    while True:
        chunk = asyncio.ensure_future(anext(chunks, None))
        try:
            while not (await asyncio.wait({chunk}, timeout=keepalive))[0]:
                yield KEEPALIVE
        finally:
            chunk.cancel()
        error = chunk.exception()
        if error is not None:
            logger.error("a stream failed: %s", error, exc_info=error)
            yield _frame(to_json(api_error(error).body()))
            return
        data = chunk.result()
        if data is None:
            yield DONE
            return
        yield _frame(data)


class EventStream(StreamingResponse):
    """Sends frames until they end, the client goes, or the client reads nothing for `stall` seconds.

    Args:
        frames: what to send.
        close: called once it is over, however it ended.
        stall: seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], close: Callable[[], None], stall: float) -> None:
        super().__init__(frames, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._frames = frames
        self._close = close
        self._stall = stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stall):
                await send(message)

        try:
            await unless_gone(receive, self.stream_response(send_in_time))
        except (ApiError, TimeoutError) as error:
            logger.info("a stream was given up: %s", error or "the client stopped reading")
        finally:
            await self._frames.aclose()
            self._close()


def _frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
