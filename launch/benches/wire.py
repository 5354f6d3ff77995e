"""One HTTP answer as it arrives over a socket: when its pieces came, and what is told once.

The client shares its machine with the server, so a frame that can only hold more text is not parsed.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

LONGEST = 300  # characters that are kept of an error
MARKS = {"completions": b'"text":"', "chat": b'"content":"'}
FIELDS = ("text", "content", "reasoning_content", "reasoning", "refusal", "tool_calls")


class Reply(asyncio.Protocol):
    """What a server answers to one request.

    Args:
        clock: seconds.
        mark: what stands before a piece's text (`MARKS`).

    Attributes:
        ended: done when all has come, or nothing more can.
        status: of HTTP; 0 before it came.
        times: when each piece of text came (s).
        end: when the answer was complete (s).
        usage: the server's count; None when it told none.
        outcome: "ok"; the status, when it is another than 200; "error frame", "broken".
        failure: what went wrong, in words.
    """

    def __init__(self, clock: Callable[[], float], mark: bytes) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.status, self.times, self.end = 0, list[float](), 0.0
        self.usage: dict[str, Any] | None = None
        self.outcome = self.failure = ""
        self._clock, self._mark = clock, mark
        self._raw, self._rest, self._body = b"", b"", b""
        self._chunked = self._events = self._finished = False
        self._left: int | None = None

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        if self.ended.done():
            return
        try:
            over = self._take(data, now)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            self._end("broken", f"sent what is no answer of OpenAI's API ({error})"[:LONGEST], now)
            return
        if over:
            self._conclude(now)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            whole = self._left is None and not self._chunked and bool(self._body)  # its end is the connection's
            if self.status and (self._finished or self.outcome or whole or self.status != 200):
                self._conclude(self._clock())
            else:
                self._end("broken", f"broke off after {len(self.times)} pieces ({error or 'closed'})", self._clock())

    def _take(self, data: bytes, now: float) -> bool:
        """Whether the answer is complete with this."""
        while not self.status:
            head, found, rest = (self._raw + data).partition(b"\r\n\r\n")
            if not found:
                self._raw += data
                return False
            self._raw, data = b"", rest
            self._open(head.decode("latin-1").split("\r\n"))
        over = False
        if self._chunked:
            data, over = self._unchunk(data)
        elif self._left is not None:
            self._left -= len(data)
            over = self._left <= 0
        if not self._events:
            self._body += data
            return over
        *lines, self._rest = (self._rest + data).split(b"\n")
        return any(self._line(line, now) for line in lines) or over

    def _open(self, lines: list[str]) -> None:
        status = int(lines[0].split()[1])
        if status < 200:  # "100 Continue": the answer is still to come
            return
        self.status = status
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = int(headers["content-length"]) if "content-length" in headers else None
        self._events = status == 200 and headers.get("content-type", "").startswith("text/event-stream")

    def _unchunk(self, data: bytes) -> tuple[bytes, bool]:
        """The whole chunks' contents, and whether the last has come."""
        raw, at, found = self._raw + data, 0, []
        over = False
        while not over and (line := raw.find(b"\r\n", at)) >= 0:
            stop = line + 2 + int(raw[at:line].partition(b";")[0], 16)
            if len(raw) < stop + 2:
                break
            found.append(raw[line + 2 : stop])
            over, at = stop == line + 2, stop + 2
        self._raw = raw[at:]
        return b"".join(found), over

    def _line(self, line: bytes, now: float) -> bool:
        """Whether it was the last of the stream."""
        if not line.startswith(b"data:"):
            return False
        at = line.find(self._mark)
        after = at + len(self._mark)
        if (
            at >= 0
            and line[after : after + 1] != b'"'
            and (b'"usage"' not in line or b'"usage":null' in line)
            and (b'"finish_reason"' not in line or b'"finish_reason":null' in line)
            and b'"error"' not in line
        ):
            self.times.append(now)
            return False
        if line[5:].strip() == b"[DONE]":
            self._finished = True
            return True
        self._told(json.loads(line[5:]), now)
        return False

    def _told(self, told: dict[str, Any], now: float) -> None:
        if told.get("error"):
            self.outcome, self.failure = "error frame", f"failed: {json.dumps(told['error'])[:LONGEST]}"
        self.usage = told.get("usage") or self.usage
        for choice in told.get("choices") or ():
            piece = choice.get("delta") or choice
            if any(piece.get(name) for name in FIELDS):
                self.times.append(now)
            self._finished = self._finished or bool(choice.get("finish_reason"))

    def _conclude(self, now: float) -> None:
        if self.status != 200:
            words = self._body.decode(errors="replace")[:LONGEST]
            self._end(str(self.status), f"answered {self.status}: {words}", now)
        elif self._events:
            cut = "" if self._finished else "broken"
            self._end(self.outcome or cut or "ok", self.failure or (cut and "broke off before its end"), now)
        else:
            try:
                self._told(json.loads(self._body), now)
                self.times.clear()  # all of it came at once: no time of a token is known
                self._end(self.outcome or "ok", self.failure, now)
            except (ValueError, TypeError, AttributeError) as error:
                self._end("broken", f"sent what is no answer of OpenAI's API ({error})", now)

    def _end(self, outcome: str, failure: str, now: float) -> None:
        self.outcome, self.failure, self.end = outcome, failure, now
        self.ended.set_result(None)
