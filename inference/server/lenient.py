"""`compat=lenient`: a field that nobody knows is left out instead of refused, and the answer's `Warning` names it."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

IGNORED = "turnout.ignored"
"""In a request's scope: the paths of the fields that were left out; not there where they are refused."""
MOST = 8
"""Fields that an answer names, each by up to `LONGEST` characters."""
LONGEST = 64


class TellIgnored:
    """Asks for unknown fields to be left out, and says which were.

    Args:
        app: reads bodies by `leave_out_unknown`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ignored: list[str] = []

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start" and ignored:
                message = {**message, "headers": [*message.get("headers", ()), (b"warning", _warning(ignored))]}
            await send(message)

        await self._app({**scope, IGNORED: ignored}, receive, telling)


def leave_out_unknown(model: type[BaseModel], data: dict[str, Any]) -> list[str]:
    """Take the fields that `model` does not know out of `data`, at any depth; returns their paths."""
    found: list[str] = []
    while places := [place for place in _unknown(model, data) if _remove(data, place)]:
        found += [".".join(map(str, place)) for place in places]
    return found


def _unknown(model: type[BaseModel], data: dict[str, Any]) -> list[tuple[str | int, ...]]:
    try:
        model.model_validate(data)
    except ValidationError as error:
        return [fault["loc"] for fault in error.errors(include_url=False) if fault["type"] == "extra_forbidden"]
    return []


def _remove(data: Any, place: Sequence[str | int]) -> bool:
    """Take what is at `place` out; a part of it that is in no container is the name of one of a union's models."""
    holder = data
    for part in place[:-1]:
        inside = isinstance(part, int) if isinstance(holder, list) else part in holder
        holder = holder[part] if inside else holder
    return isinstance(holder, dict) and holder.pop(place[-1], holder) is not holder


def _warning(ignored: Sequence[str]) -> bytes:
    names = [re.sub(r"[^0-9A-Za-z_.-]", "?", name)[:LONGEST] for name in ignored[:MOST]]
    more = f" and {len(ignored) - MOST} more" if len(ignored) > MOST else ""
    return f'299 turnout "ignored: {", ".join(names)}{more}"'.encode()
