"""What the server writes while it runs: a line for every request at its end and whatever else is logged, as text or
JSON.

A request's line tells its id, what was asked for, how it was answered, how many tokens and how long. Prompts and
completions are in no line.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import LogFormat
from .requests import request_id
from .shell import DIRECT

if TYPE_CHECKING:
    from .generation import Generation

QUIET = ("/health", "/ready", "/load", "/metrics")
"""Asked for every few seconds: their lines are left out unless something is wrong."""
LONGEST = 200  # characters of a path

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """What there is to tell of one HTTP request and its answer.

    Args:
        method, path: as they came, the path still escaped.
        headers: the request's that tell of a trace.
        began, ended: on `time.monotonic`.
        status: 0 = nothing was answered.
        generation: what the engine did for it.
    """

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    status: int = 0
    generation: "Generation | None" = None

    def fields(self) -> dict[str, Any]:
        """What its line tells; tokens, time to the first one and finish reasons where the engine was asked."""
        told = {"method": self.method, "path": self.path, "status": self.status}
        if self.generation is not None:
            usage, first = self.generation.usage(), self.generation.first
            told |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
            told |= {} if first is None else {"ttft_seconds": round(first - self.began, 6)}
            told |= {"finish_reason": ",".join(self.generation.reasons)}
        return told | {"total_seconds": round(self.ended - self.began, 6)}


entry: ContextVar[Entry | None] = ContextVar("entry", default=None)
"""Of the request that this task serves."""


class LogRequests:
    """The outermost layer: sees every request to its end, and hands it on.

    Args:
        app: what answers.
        sinks: what each entry is given to, once it is over.
    """

    def __init__(self, app: ASGIApp, sinks: Sequence[Callable[[Entry], None]]) -> None:
        self._app, self._sinks = app, sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("raw_path", b"").partition(b"?")[0].decode("latin-1")[:LONGEST]
        trace = {
            name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name.startswith(b"trace")
        }
        this = Entry(scope["method"], path, trace)
        entry.set(this)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                this.status = message["status"]
            await send(message)

        try:
            await self._app({**scope, DIRECT: send}, receive, noting)
        finally:
            this.ended = time.monotonic()
            for sink in self._sinks:
                sink(this)


def write_line(this: Entry) -> None:
    """The sink that logs."""
    quiet = this.status == 200 and this.path in QUIET
    logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": this.fields()})


class LineFormatter(logging.Formatter):
    """One line a record, but for tracebacks in text: time, level, what happened, the request's id, further fields."""

    def __init__(self, form: LogFormat) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields = {"request_id": request_id.get(), **getattr(record, "fields", {})}
        told = {name: value for name, value in fields.items() if value != ""}
        trace = self.formatException(record.exc_info) if record.exc_info else None
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        if self._json:
            told |= {} if trace is None else {"traceback": trace}
            line = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()} | told
            return json.dumps(line, ensure_ascii=True, default=str)
        words = [f"{name}={_word(value)}" for name, value in told.items()]
        text = " ".join([moment, record.levelname, _one_line(record.getMessage()), *words])
        return text if trace is None else f"{text}\n{trace}"


def set_up(form: LogFormat) -> None:
    """Have everything that is logged written to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(form))
    root = logging.getLogger()
    root.handlers = [handler]
    logging.getLogger(__name__).setLevel(logging.INFO)


def _word(value: object) -> str:
    text = str(value)
    return text if text and all(c.isalnum() or c in "-_.:/,%" for c in text) else json.dumps(text)


def _one_line(text: str) -> str:
    """Also without what a terminal would obey, or another reader take for a line's end."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
