"""A crowd of clients over raw sockets: most stay, some leave in any phase, some read slowly or not at all, and some ask
what breaks the model.

Whatever a client got is held against the oracle: a whole answer must be the oracle's, a part of one must begin like it.
"""

import asyncio
import json
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .oracle import Oracle

SHARED = 48  # tokens that many prompts begin with: whole blocks of the prefix cache
ENDLESS = 2000  # tokens that nobody waits for
SECONDS = 120.0  # bounds a failing test
STAYS = {"stream": 63, "whole": 10}
BREAKS = {"poisoned": 2}
LEAVES = dict.fromkeys(("in the head", "in the body", "at once", "waiting", "streaming", "half-closed"), 20 / 6)
SLOW = {"slow": 2.5, "stalled": 2.5}
TEMPERS = STAYS | BREAKS | LEAVES | SLOW
CALL = re.compile(rb"cmpl-\w+")
CHUNK = re.compile(rb"([0-9a-fA-F]+)\r\n")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    prompt: list[int]
    max_tokens: int
    n: int
    stream: bool
    logprobs: int | None
    endless: bool

    def body(self, model: str) -> bytes:
        fields: dict[str, Any] = {"model": model, "prompt": self.prompt, "max_tokens": self.max_tokens, "n": self.n}
        fields |= {"stream": self.stream, "logprobs": self.logprobs, "ignore_eos": self.endless, "temperature": 0}
        return json.dumps(fields).encode()


@dataclass(frozen=True)
class Answer:
    """What came, in bytes, as far as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def read(cls, raw: bytes) -> "Answer":
        head, _, body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join(_chunks(body))
        return cls(int(first.split()[1]), headers, body)


def _chunks(data: bytes) -> Iterator[bytes]:
    at = 0
    while found := CHUNK.match(data, at):
        size = int(found[1], 16)
        yield data[found.end() : found.end() + size]
        at = found.end() + size + 2


class Crowd:
    """Clients of one server.

    Args:
        url: of the server.
        model: its name in requests.
        oracle: knows every answer.
        ended: whether the server has done with a call of this id.

    Attributes:
        seen: temper → clients of it, and what became of requests: `refused`, `finished`, `tokens`.
    """

    def __init__(self, url: str, model: str, oracle: Oracle, ended: Callable[[str], bool]) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._address, self._model, self._oracle, self._ended = (host, int(port)), model, oracle, ended
        self.seen: Counter[str] = Counter()

    async def come(self, count: int, seed: int, at_once: int) -> None:
        """All clients, at most `at_once` at a time; raises the first failure of any."""
        room = asyncio.Semaphore(at_once)

        async def enter(number: int) -> None:
            async with room:
                rng = random.Random(f"{seed}/{number}")
                await self.visit(*rng.choices(list(TEMPERS), list(TEMPERS.values())), rng)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(enter(number))

    async def visit(self, temper: str, rng: random.Random) -> None:
        """One client, who comes again as long as it is refused."""
        self.seen[temper] += 1
        ask = self._ask(rng, temper)
        async with asyncio.timeout(SECONDS):
            while not await self._call(rng, temper, ask):
                self.seen["refused"] += 1
                await asyncio.sleep(rng.uniform(0.05, 0.5))

    def _ask(self, rng: random.Random, temper: str) -> Ask:
        shared = [rng.choice([5, 6, 7])] * rng.choice([0, SHARED, SHARED])
        prompt = shared + rng.choices(self._oracle.ids[1:], k=rng.randint(1, 60))
        prompt += [self._oracle.poison] * (temper == "poisoned")
        endless = temper in LEAVES or temper == "stalled"
        return Ask(
            prompt=prompt,
            max_tokens=ENDLESS if endless else rng.choice([1, rng.randint(2, 40)]),
            n=4 if temper == "stalled" else rng.choice([1, 1, 1, 2]),
            stream=temper not in ("whole", "waiting") and (temper != "poisoned" or rng.random() < 0.5),
            logprobs=20 if temper == "stalled" else rng.choice([None, None, 0, 1]),
            endless=endless,
        )

    async def _call(self, rng: random.Random, temper: str, ask: Ask) -> bool:
        """Whether the client was let in, or has left without asking."""
        reader, writer = await self._connect(temper)
        body = ask.body(self._model)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._address[0]}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        cut = {"in the head": rng.randrange(1, len(head)), "in the body": rng.randrange(len(head), len(data))}
        try:
            writer.write(data[: cut.get(temper)])
            await writer.drain()
            if temper in cut or temper == "at once":
                return True
            return self._check(temper, ask, await self._listen(rng, temper, reader, writer))
        finally:
            if temper in LEAVES and rng.random() < 0.5:  # without a farewell
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()

    async def _connect(self, temper: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        own = socket.socket()
        own.setblocking(False)
        if temper == "stalled":  # little fits into the kernel's buffers, on both sides
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        await asyncio.get_running_loop().sock_connect(own, self._address)
        return await asyncio.open_connection(sock=own, limit=4096 if temper == "stalled" else 2**16)

    async def _listen(
        self, rng: random.Random, temper: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        """All bytes that the client has the patience for."""
        if temper == "waiting":
            try:
                async with asyncio.timeout(rng.uniform(0, 0.2)):
                    return await reader.read()
            except TimeoutError:
                return b""
        raw = b""
        if temper in ("streaming", "half-closed", "stalled"):
            while b"}]}" not in raw and (more := await reader.read(1024)):
                raw += more
        if temper == "streaming":
            return raw
        if temper == "half-closed":
            writer.write_eof()
        if temper == "stalled" and (found := CALL.search(raw)):
            while not self._ended(found[0].decode()):
                await asyncio.sleep(0.05)
        while more := await self._read(reader, temper):
            raw += more
            if temper == "slow":
                await asyncio.sleep(rng.uniform(0, 0.05))
        return raw

    async def _read(self, reader: asyncio.StreamReader, temper: str) -> bytes:
        try:
            return await reader.read(512 if temper == "slow" else -1)
        except ConnectionResetError:
            if temper in ("half-closed", "stalled"):
                return b""
            raise

    def _check(self, temper: str, ask: Ask, raw: bytes) -> bool:
        if not raw and temper == "waiting":
            return True
        answer = Answer.read(raw)
        if answer.status != 200:
            error = json.loads(answer.body)["error"]
            if temper == "poisoned" and answer.status == 500:
                assert error["code"] == "internal_error"
                return True
            assert (answer.status, error["code"]) == (429, "queue_full"), raw
            assert int(answer.headers["retry-after"]) > 0
            return False
        assert temper != "poisoned", "there is no answer to that"
        whole = temper in STAYS or temper == "slow"
        self._check_stream(ask, answer.body, whole) if ask.stream else self._check_whole(ask, answer.body)
        self.seen["finished"] += whole
        return True

    def _check_whole(self, ask: Ask, body: bytes) -> None:
        found = json.loads(body)
        for choice in found["choices"]:
            self._check_choice(ask, choice["index"], choice["text"], choice["finish_reason"], choice["logprobs"])
        assert len(found["choices"]) == ask.n
        tokens = sum(len(self._said(ask, index)) for index in range(ask.n))
        assert found["usage"]["completion_tokens"] == tokens
        self.seen["tokens"] += tokens

    def _check_stream(self, ask: Ask, body: bytes, whole: bool) -> None:
        *frames, rest = body.split(b"\n\n")
        assert (frames[-1:] == [b"data: [DONE]"]) == whole, body[-500:]
        assert not (whole and rest)
        texts, reasons, tokens = [""] * ask.n, [None] * ask.n, [[] for _ in range(ask.n)]
        for frame in frames[: -1 if whole else None]:
            if frame.startswith(b":"):
                continue
            (choice,) = json.loads(frame.removeprefix(b"data: "))["choices"]
            index = choice["index"]
            assert reasons[index] is None, "one end a choice"
            texts[index] += choice["text"]
            reasons[index] = choice["finish_reason"]
            tokens[index] += choice["logprobs"]["tokens"] if choice["logprobs"] else []
        for index in range(ask.n):
            logprobs = {"tokens": tokens[index]} if ask.logprobs is not None else None
            if whole:
                self._check_choice(ask, index, texts[index], reasons[index], logprobs)
                self.seen["tokens"] += len(self._said(ask, index))
            else:
                assert self._oracle.text(self._said(ask, index)).startswith(texts[index])

    def _check_choice(self, ask: Ask, index: int, text: str, reason: str | None, logprobs: Any) -> None:
        said = self._said(ask, index)
        assert text == self._oracle.text(said)
        assert reason == ("stop" if said[-1] == self._oracle.end else "length")
        if ask.logprobs is not None:
            assert len(logprobs["tokens"]) == len(said)
            assert "".join(logprobs["tokens"]).removesuffix("<|endoftext|>") == text

    def _said(self, ask: Ask, index: int) -> list[int]:
        return self._oracle.answer(ask.prompt, ask.max_tokens, index, endless=ask.endless)
