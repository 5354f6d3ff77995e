"""Streaming completions of any server that speaks OpenAI's API, as they arrive, timed as a client sees them.

Plain HTTP over sockets: client and server share the machine, so the client does as little as it can.
"""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
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
    first = last = None
    tokens = 0
    async for chunk in _events(url, body):
        if "error" in chunk:
            raise PeerError(f"{url} failed: {json.dumps(chunk['error'])[:300]}")
        if chunk.get("choices"):
            last = time.perf_counter() - start
            first = last if first is None else first
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
    if first is None or last is None or tokens != ask.tokens:
        raise PeerError(f"{url} gave {tokens} of {ask.tokens} tokens: its context may be too short")
    return Answer(
        ttft=first - ask.due, tpot=(last - first) / (tokens - 1) if tokens > 1 else None, tokens=tokens, end=last
    )


async def _events(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The data frames of one streamed completion."""
    where = urlsplit(url)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 20)
            try:
                writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
                status = await reader.readline()
                if b" 200 " not in status:
                    rest = (await reader.read(2000)).decode(errors="replace")
                    raise PeerError(f"{url} answered {status.decode().strip()}: {rest.partition('{')[2][:300]}")
                async for line in reader:  # headers and the sizes of chunks are no frames
                    if line.startswith(b"data: {"):
                        yield json.loads(line[6:])
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        raise PeerError(f"{url} broke off ({error or type(error).__name__}): see the server's log") from error
