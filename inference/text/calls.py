"""Function calls in a model's text, found as it comes.

A call is `{"name": ..., "arguments" | "parameters": {...}}`, alone, in a list, in `<tool_call>` tags or in a fence of
json: what models write whose template shows them tools as JSON. What only looks like one is text. Pieces of any size
give the same calls and the same text as the whole.

The parser is a coroutine: it yields what it has found, and None where it needs more text.
"""

import json
import re
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass
from typing import Any

CLOSERS = {"<tool_call>": "</tool_call>", "```json": "```"}
OPENER = re.compile("|".join(map(re.escape, CLOSERS)))
ARGUMENTS = ("arguments", "parameters")
LONGEST = 4096  # characters of a name, or of a text beside name and arguments
HELD = 2**14  # characters that may be held back before their call has a name

BLANKS = " \t\n\r"
STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"', re.DOTALL)
PLAIN = re.compile(r"[-+.0-9a-zA-Z]+(?=[ \t\n\r,}])")
BRACKET, QUOTED = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments: JSON as the model wrote it, to be joined."""

    index: int
    piece: str


Event = str | CallStart | CallArguments
"""A text is what is said beside the calls; blanks around calls are not said."""


class _NoCall(Exception):  # noqa: N818 - not an error
    """What has come is no call."""


class _Cut(_NoCall):
    """The text ended within what may have been one."""


class CallParser:
    """The calls in one choice's text. Feed it with `push`, then `finish`; both return what is new.

    Args:
        names: the functions that there are: a call of any other is text.
        forced: the text is the arguments of this function and nothing else.
        most: calls to tell; None = all. Further ones are left out.
    """

    def __init__(self, names: Collection[str], forced: str | None = None, most: int | None = None) -> None:
        self._names, self._most = names, most
        self._text = ""
        self._at = 0
        """The next character to look at."""
        self._told = 0
        """What comes before has been said, or is a call."""
        self._calls = 0
        self._quiet = False
        """Nothing has been said since the last call."""
        self._ended = False
        self._run = self._answer() if forced is None else self._forced(forced)

    @property
    def called(self) -> bool:
        """A call has begun."""
        return self._calls > 0

    def push(self, piece: str) -> list[Event]:
        """The text goes on."""
        self._text += piece
        return list(self._drain())

    def finish(self) -> list[Event]:
        """The text has ended, once."""
        self._ended = True
        return list(self._drain())

    def _drain(self) -> Iterator[Event]:
        for event in self._run:
            if event is None:
                return
            if isinstance(event, str) or self._most is None or event.index < self._most:
                yield event

    def _forced(self, name: str) -> Iterator[Event | None]:
        self._calls = 1
        yield CallStart(0, name)
        while True:
            if self._told < len(self._text):
                yield CallArguments(0, self._text[self._told :])
                self._told = len(self._text)
            if self._ended:
                return
            yield None

    def _answer(self) -> Iterator[Event | None]:
        """Text and calls in turns; a call without tag or fence stands where nothing was said, or behind another."""
        bare = True
        while first := (yield from self._next()):
            found = OPENER.search(self._text, self._at)
            begin = self._at
            if bare and first in "{[":
                inside, closer = begin, ""
            elif found is not None and found.start() == begin:
                inside, closer = found.end(), CLOSERS[found[0]]
            else:
                bare = False
                yield from self._plain(len(self._text) if found is None else found.start(), whole=found is not None)
                continue
            told, self._at = self._told, inside
            try:
                yield from self._block(closer)
                bare = True
            except _NoCall as reason:
                bare = False
                if self._told == told:
                    yield from self._say(max(inside, begin + 1))
                elif isinstance(reason, _Cut):
                    self._told = self._at = len(self._text)
                else:
                    self._at = self._told
        if not self._calls and self._told < len(self._text):
            yield self._text[self._told :]

    def _plain(self, end: int, whole: bool) -> Iterator[Event | None]:
        """Say what is text for sure: all before `end`, but, unless it is `whole`, not what may begin an opener."""
        if not whole and not self._ended:
            end -= max((k for opener in CLOSERS for k in range(len(opener)) if self._ends(opener[:k])), default=0)
        if end > self._at:
            yield from self._say(end)
        else:
            yield None

    def _ends(self, part: str) -> bool:
        return self._text.endswith(part, self._at)

    def _say(self, end: int) -> Iterator[Event]:
        """Say the text up to `end`, but hold back blanks at its end: a call may follow."""
        piece = self._text[self._told : end].rstrip(BLANKS)
        yield piece.lstrip(BLANKS) if self._quiet else piece
        self._told, self._at, self._quiet = self._told + len(piece), end, False

    def _block(self, closer: str) -> Iterator[Event | None]:
        """Calls up to their closer, which may be missing."""
        again = True
        while again:
            yield from self._value()
            again = (yield from self._next()) == "{" and closer == CLOSERS["<tool_call>"]
        while closer.startswith(rest := self._text[self._at :]) and rest != closer and not self._ended:
            yield None
        if rest.startswith(closer):
            self._at += len(closer)
        self._told = self._at

    def _value(self) -> Iterator[Event | None]:
        """One call or a list of them."""
        listed = (yield from self._take("{[")) == "["
        if listed:
            yield from self._take("{")
        yield from self._call()
        while listed and (yield from self._take(",]")) == ",":
            yield from self._take("{")
            yield from self._call()
        self._told = self._at

    def _call(self) -> Generator[Event | None, None, None]:
        """One call behind its brace."""
        name, index, early, more = None, -1, (0, 0), True
        while more:
            key = yield from self._string()
            yield from self._take(":")
            first = yield from self._next()
            begin = self._at
            if key == "name" and name is None:
                name = yield from self._string()
                if name not in self._names:
                    raise _NoCall
                if early[1]:
                    index = self._start()
                    yield CallStart(index, name)
                    yield CallArguments(index, self._text[slice(*early)])
                    self._told = self._at
            elif key in ARGUMENTS and first == "{" and index < 0 and not early[1]:
                if name is not None:
                    index = self._start()
                    yield CallStart(index, name)
                yield from self._body(None if name is None else index)
                early = (begin, self._at)
            else:
                yield from self._other(first)
            more = (yield from self._take(",}")) == ","
        if index < 0:
            raise _NoCall
        self._told = self._at

    def _start(self) -> int:
        self._told, self._quiet = self._at, True
        self._calls += 1
        return self._calls - 1

    def _body(self, index: int | None) -> Iterator[Event | None]:
        """Pass over an object or a list; with an index, tell it as a call's arguments as it comes."""
        depth, quoted = 0, False
        while True:
            found = (QUOTED if quoted else BRACKET).search(self._text, self._at)
            self._at = found.end() if found is not None else len(self._text)
            mark = "" if found is None else found[0]
            if mark == '"':
                quoted = not quoted
            elif mark == "\\":
                while self._at == len(self._text):
                    yield from self._wait()
                self._at += 1
            elif mark:
                depth += 1 if mark in "{[" else -1
            if (not mark or not depth) and index is not None and self._told < self._at:
                yield CallArguments(index, self._text[self._told : self._at])
                self._told = self._at
            if mark and not depth:
                return
            if index is None and self._at - self._told > HELD:
                raise _NoCall
            if not mark:
                yield from self._wait()

    def _other(self, first: str) -> Generator[Event | None, None, Any]:
        """Pass over a value that is of no interest."""
        if first in "{[":
            return (yield from self._body(None))
        if first == '"':
            return (yield from self._string())
        while (found := PLAIN.match(self._text, self._at)) is None:
            if not re.fullmatch(r"[-+.0-9a-zA-Z]+", self._text[self._at : self._at + LONGEST]):
                raise _NoCall
            yield from self._wait()
        self._at = found.end()
        return None

    def _string(self) -> Generator[Event | None, None, str]:
        if (yield from self._next()) != '"':
            raise _NoCall if self._at < len(self._text) else _Cut
        while (found := STRING.match(self._text, self._at)) is None:
            if len(self._text) - self._at > LONGEST:
                raise _NoCall
            yield from self._wait()
        self._at = found.end()
        try:
            return str(json.loads(found[0]))
        except ValueError as error:
            raise _NoCall from error

    def _take(self, wanted: str) -> Generator[Event | None, None, str]:
        """Pass over one of these characters."""
        found = yield from self._next()
        if not found:
            raise _Cut
        if found not in wanted:
            raise _NoCall
        self._at += 1
        return found

    def _next(self) -> Generator[Event | None, None, str]:
        """The next character that is not blank; none at the end of the text."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in BLANKS:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            yield None

    def _wait(self) -> Iterator[None]:
        """Until there is more text."""
        if self._ended:
            raise _Cut
        yield None
