"""Streaming completions of any server that speaks OpenAI's API, as they arrive, timed as a client sees them.

Plain HTTP over sockets: client and server share the machine, so the client does as little as it can.
"""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ... import PeerError
from ..streams import percentile

TIMEOUT = 600.0  # seconds that one request may take


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One completion that is wanted.

    Args:
        prompt: token ids, or a text.
        tokens: how many, whatever is generated.
        due: seconds after the beginning.
    """

    prompt: tuple[int, ...] | str
    tokens: int
    due: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion that came.

    Args:
        ttft: from the moment it was due to the first piece (s).
        tpot: between tokens after the first (s); None for one token.
        tokens: by the server's count.
        end: seconds after the beginning.
    """

    ttft: float
    tpot: float | None
    tokens: int
    end: float


def models(url: str) -> list[str]:
    """The names of the models that a server has.

    Raises:
        PeerError: it does not answer as OpenAI's does.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as response:  # noqa: S310
            return [one["id"] for one in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError) as error:
        raise PeerError(f"{url} does not list its models ({error}): start a server that speaks OpenAI's API") from error


def run(url: str, model: str, asks: Sequence[Ask]) -> list[Answer]:
    """Send each request when it is due, however many are still running (open loop); answers in the same order.

    Args:
        url: `http://HOST:PORT`.

    Raises:
        PeerError: a request failed, or came back shorter than wanted.
    """
    return asyncio.run(_all(url, model, asks))


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Times in seconds, tokens of all answers a second."""
    ttft = [answer.ttft for answer in answers]
    tpot = [answer.tpot for answer in answers if answer.tpot is not None] or [0.0]
    return {
        "tokens_per_second": sum(answer.tokens for answer in answers) / max(answer.end for answer in answers),
        "ttft_p50": percentile(ttft, 0.5),
        "ttft_p99": percentile(ttft, 0.99),
        "tpot_p50": percentile(tpot, 0.5),
        "tpot_p99": percentile(tpot, 0.99),
    }


async def _all(url: str, model: str, asks: Sequence[Ask]) -> list[Answer]:
    start = time.perf_counter()
    return list(await asyncio.gather(*(_one(url, model, ask, start) for ask in asks)))


async def _one(url: str, model: str, ask: Ask, start: float) -> Answer:
    await asyncio.sleep(ask.due - (time.perf_counter() - start))
    body = {
        "model": model, "prompt": ask.prompt, "max_tokens": ask.tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    found = await _streamed(url, body)
    tokens = found.usage["completion_tokens"] if found.usage else 0
    if not found.first or tokens != ask.tokens:
        raise PeerError(f"{url} gave {tokens} of {ask.tokens} tokens: its context may be too short")
    first, last = found.first - start, found.last - start
    return Answer(
        ttft=first - ask.due, tpot=(last - first) / (tokens - 1) if tokens > 1 else None, tokens=tokens, end=last
    )


class _Stream(asyncio.Protocol):
    """One streamed completion, as it arrives: when its pieces came, and what is told once. Nothing else is parsed,
    because a client takes its time from the server beside it.

    Attributes:
        first, last: of the pieces with a choice (s); 0 when none came.
        usage: the server's count.
        failure: what went wrong, in words.
        ended: the connection is closed.
    """

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.usage: dict[str, Any] | None = None
        self.failure = ""
        self.ended = asyncio.get_running_loop().create_future()
        self._rest = b""
        self._begun = False

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):  # headers and the sizes of chunks are no frames
                self._frame(line, now)
            elif not self._begun:
                self._begun = True
                self.failure = "" if b" 200 " in line else f"answered {line.decode().strip()}"

    def connection_lost(self, error: Exception | None) -> None:
        if self.failure.startswith("answered"):
            self.failure += f": {self._rest.decode(errors='replace')[:300]}"
        self.failure = self.failure or (f"broke off ({error})" if error else "")
        if not self.ended.done():
            self.ended.set_result(None)

    def _frame(self, line: bytes, now: float) -> None:
        if b'"error"' in line or (b'"usage"' in line and b'"usage":null' not in line):
            told = json.loads(line[6:])
            self.usage = told.get("usage") or self.usage
            self.failure = f"failed: {json.dumps(told['error'])[:300]}" if "error" in told else self.failure
            if not told.get("choices"):
                return
        self.first, self.last = self.first or now, now


async def _streamed(url: str, body: dict[str, Any]) -> _Stream:
    """Post a completion and wait for its end.

    Raises:
        PeerError: it failed.
    """
    where = urlsplit(url)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    try:
        async with asyncio.timeout(TIMEOUT):
            loop = asyncio.get_running_loop()
            transport, found = await loop.create_connection(_Stream, where.hostname or "", where.port or 80)
            try:
                transport.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
                await found.ended
            finally:
                transport.close()
    except (OSError, TimeoutError) as error:
        raise PeerError(f"{url} broke off ({error or type(error).__name__}): see the server's log") from error
    if found.failure:
        raise PeerError(f"{url} {found.failure}")
    return found
