"""Concurrent streaming completions through the official `openai` client: printed as they come, and timed.

Works against any OpenAI-compatible server. Times are wall-clock seconds as the client sees them.
"""

import asyncio
import functools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import DataError


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One completed stream.

    Args:
        ttft: time to first token, from sending the request to the first piece of text (s).
        tpot: time per output token after the first (s); None for a single token.
        tokens: completion tokens by the server's count.
    """

    prompt: str
    text: str
    finish_reason: str
    tokens: int
    ttft: float
    tpot: float | None


class LinePrinter:
    """Prints several streams interleaved, line by line, each line led by its stream's number.

    A line is printed when it is complete or wide enough, so the output reads well in a terminal and in a pipe.
    """

    def __init__(self, write: Callable[[str], None], width: int = 100) -> None:
        self._write, self._width = write, width
        self._pending: dict[int, str] = {}

    def add(self, stream: int, piece: str) -> None:
        """Take the next piece of a stream's text and print the lines that it completes."""
        text = self._pending.get(stream, "") + piece
        while "\n" in text or len(text) > self._width:
            line, text = self._split(text)
            self._emit(stream, line)
        self._pending[stream] = text

    def end(self, stream: int) -> None:
        """Print what is left of a stream."""
        self._emit(stream, self._pending.pop(stream, ""))

    def _split(self, text: str) -> tuple[str, str]:
        line, newline, rest = text.partition("\n")
        if newline and len(line) <= self._width:
            return line, rest
        cut = text.rfind(" ", 1, self._width + 1)
        return (text[:cut], text[cut + 1 :]) if cut > 0 else (text[: self._width], text[self._width :])

    def _emit(self, stream: int, line: str) -> None:
        if line.strip():
            self._write(f"[{stream}] {line.rstrip()}")


def stream_completions(
    base_url: str, prompts: Sequence[str], write: Callable[[str], None], *, max_tokens: int, timeout: float = 120.0
) -> list[Streamed]:
    """Send all `prompts` at once to `<base_url>/completions`, print the texts as they come, return them timed.

    Args:
        base_url: up to and including `/v1`; the first model that the server lists is asked.
        prompts: one request each, sampled at temperature 0.8 with its index as seed.
        write: prints one line.
        max_tokens: of each completion.
        timeout: of one request (s).
    """
    return asyncio.run(_stream_all(base_url, prompts, LinePrinter(write), max_tokens, timeout))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` (0 to 1) of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


async def _stream_all(
    base_url: str, prompts: Sequence[str], printer: LinePrinter, max_tokens: int, timeout: float
) -> list[Streamed]:
    import openai  # takes a second, so only where it is used

    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=timeout, max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        request = functools.partial(
            client.completions.create,
            model=model,
            max_tokens=max_tokens,
            temperature=0.8,
            stream=True,
            stream_options={"include_usage": True},
        )
        streams = (_stream_one(request, i, prompt, printer) for i, prompt in enumerate(prompts))
        return list(await asyncio.gather(*streams))


async def _stream_one(
    request: Callable[..., Awaitable[Any]], number: int, prompt: str, printer: LinePrinter
) -> Streamed:
    started = time.monotonic()
    pieces: list[str] = []
    times: list[float] = []
    reason, tokens = "", 0
    printer.add(number, prompt)
    async for chunk in await request(prompt=prompt, seed=number):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            if choice.text:
                times.append(time.monotonic())
                pieces.append(choice.text)
                printer.add(number, choice.text)
    printer.end(number)
    if not times:
        raise DataError(f"stream {number} ({prompt!r}) ended without text: see the server's log")
    return Streamed(
        prompt=prompt,
        text="".join(pieces),
        finish_reason=reason,
        tokens=tokens,
        ttft=times[0] - started,
        tpot=(times[-1] - times[0]) / (tokens - 1) if tokens > 1 else None,
    )
