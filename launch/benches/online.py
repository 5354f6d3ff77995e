"""Completions of any server that speaks OpenAI's API, timed as a client sees them.

Plain HTTP over sockets: client and server share the machine, so the client does as little as it can. A request is timed
from when it was DUE, not from when it could be sent: a client that falls behind makes nobody look faster (no
coordinated omission). What goes wrong with a request is kept as its outcome and stops no other.
"""

import asyncio
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal
from urllib.parse import urlsplit

from ... import PeerError
from .wire import MARKS, Reply

TIMEOUT = 600.0  # seconds that one request may take
WANTS: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
"""What not every server knows; see `known`."""
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One completion that is wanted.

    Args:
        prompt: token ids, or a text.
        tokens: how many, whatever is generated.
        due: seconds after the beginning.
        shared: so many of its first tokens are other prompts' too; 0 = it is its own.
    """

    prompt: tuple[int, ...] | str
    tokens: int
    due: float = 0.0
    shared: int = 0


@dataclass(frozen=True, kw_only=True)
class Target:
    """Whom to ask, and how.

    Args:
        url: `http://HOST:PORT`, with or without `/v1`.
        model: its name.
        endpoint: completions or chat.
        key: sent as `Authorization: Bearer`; None = none.
        stream: token by token.
        without: fields of `WANTS` that are not sent.
    """

    url: str
    model: str
    endpoint: Literal["completions", "chat"] = "completions"
    key: str | None = None
    stream: bool = True
    without: tuple[str, ...] = ()

    def message(self, ask: Ask) -> bytes:
        """The request as it goes over the wire."""
        where = urlsplit(root(self.url))
        body: dict[str, Any] = {"model": self.model, "max_tokens": ask.tokens, "temperature": 0, "stream": self.stream}
        body |= {"messages": [{"role": "user", "content": ask.prompt}]} if self.chats else {"prompt": ask.prompt}
        body |= {name: value for name, value in WANTS.items() if name not in self.without}
        if not self.stream:
            body.pop("stream_options", None)
        data = json.dumps(body).encode()
        path = f"{where.path}/v1/{'chat/completions' if self.chats else 'completions'}"
        lines = [
            f"POST {path} HTTP/1.1", f"Host: {where.netloc}", "Content-Type: application/json",
            f"Content-Length: {len(data)}", "Connection: close",
        ]  # fmt: skip
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        return "\r\n".join([*lines, "", ""]).encode() + data

    @property
    def chats(self) -> bool:
        return self.endpoint == "chat"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one request. Times are seconds after the beginning.

    Args:
        due: when it should have been sent.
        sent: when it was; None when no connection could be made.
        times: of each piece of text.
        end: when it was over.
        wanted: tokens that were asked for.
        tokens: that came, by the server's count, or else by pieces.
        counted: by whom.
        prompt_tokens: by the server's count.
        status: of HTTP; 0 when none came.
        outcome: "ok", a status, "error frame", "broken", "timeout" or "no connection".
        failure: in words.
    """

    due: float
    sent: float | None
    times: tuple[float, ...]
    end: float
    wanted: int
    tokens: int
    counted: Literal["usage", "pieces"] = "usage"
    prompt_tokens: int | None = None
    status: int = 200
    outcome: str = "ok"
    failure: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def ttft(self) -> float | None:
        """To the first piece, from when it was due; None when there was none."""
        return self.times[0] - self.due if self.times else None

    @property
    def tpot(self) -> float | None:
        """Between tokens after the first; None for one token."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.times and self.tokens > 1 else None

    @property
    def e2e(self) -> float:
        return self.end - self.due

    @property
    def gaps(self) -> list[float]:
        """Between pieces."""
        return [later - earlier for earlier, later in pairwise(self.times)]


def root(url: str) -> str:
    """The address without `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


def models(url: str, key: str | None = None) -> list[str]:
    """The names of the models that a server has.

    Raises:
        PeerError: it does not answer as OpenAI's does.
    """
    asked = urllib.request.Request(f"{root(url)}/v1/models")  # noqa: S310  (the URL is of who runs the load)
    if key is not None:
        asked.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(asked, timeout=10) as response:  # noqa: S310  (the same)
            return [one["id"] for one in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError) as error:
        raise PeerError(f"{url} does not list its models ({error}): start a server that speaks OpenAI's API") from error


def known(target: Target, ask: Ask) -> Target:
    """The target with what it takes of `WANTS`: a server may refuse fields that it does not know (400, 422)."""
    for without in ((), ("ignore_eos",), ("stream_options",), ("ignore_eos", "stream_options")):
        tried = Target(**{**vars(target), "without": without})
        if run(tried, [ask])[0].status not in (400, 422):
            return tried
    return target


def run(
    target: Target, asks: Sequence[Ask], seats: int | None = None, *, clock: Clock = time.perf_counter,
    start: float | None = None,
) -> list[Answer]:  # fmt: skip
    """Send the requests; answers in the same order.

    Args:
        target: whom to ask.
        asks: the requests, each sent when it is due however many still run (open loop).
        seats: closed loop instead: so many at a time, each sent when one before it has ended, and due then.
        clock: seconds.
        start: the clock's time of the beginning; None = now.
    """
    return asyncio.run(_all(target, asks, seats, clock, start))


async def _all(
    target: Target, asks: Sequence[Ask], seats: int | None, clock: Clock, start: float | None
) -> list[Answer]:
    messages = [target.message(ask) for ask in asks]  # before the clock runs
    begun = clock() if start is None else start
    if seats is None:
        return list(
            await asyncio.gather(*(_due(target, a, m, clock, begun) for a, m in zip(asks, messages, strict=True)))
        )
    found: list[Answer | None] = [None] * len(asks)
    rest = iter(range(len(asks)))
    await asyncio.gather(*(_seat(target, asks, messages, rest, found, clock, begun) for _ in range(seats)))
    return [answer for answer in found if answer is not None]


async def _due(target: Target, ask: Ask, message: bytes, clock: Clock, start: float) -> Answer:
    await asyncio.sleep(ask.due - (clock() - start))
    return await _one(target, ask, message, ask.due, clock, start)


async def _seat(
    target: Target, asks: Sequence[Ask], messages: Sequence[bytes], rest: Iterator[int], found: list[Answer | None],
    clock: Clock, start: float,
) -> None:  # fmt: skip
    for at in rest:
        found[at] = await _one(target, asks[at], messages[at], clock() - start, clock, start)


async def _one(target: Target, ask: Ask, message: bytes, due: float, clock: Clock, start: float) -> Answer:
    where, sent = urlsplit(target.url), None
    secure = ssl.create_default_context() if where.scheme == "https" else None
    reply = Reply(clock, MARKS[target.endpoint])
    try:
        async with asyncio.timeout(TIMEOUT):
            port = where.port or (443 if secure else 80)
            connected = asyncio.get_running_loop().create_connection(
                lambda: reply, where.hostname or "", port, ssl=secure
            )
            transport, _ = await connected
            try:
                sent = clock() - start
                transport.write(message)
                await reply.ended
            finally:
                transport.close()
    except TimeoutError:
        reply.outcome, reply.failure, reply.end = "timeout", f"took more than {TIMEOUT:g} s", clock()
    except OSError as error:
        reply.outcome, reply.failure, reply.end = "no connection", f"broke off ({error})", clock()
    usage = reply.usage or {}
    return Answer(
        due=due, sent=sent, times=tuple(at - start for at in reply.times), end=reply.end - start, wanted=ask.tokens,
        tokens=usage.get("completion_tokens", len(reply.times)),
        counted="usage" if "completion_tokens" in usage else "pieces", prompt_tokens=usage.get("prompt_tokens"),
        status=reply.status, outcome=reply.outcome, failure=reply.failure,
    )  # fmt: skip
