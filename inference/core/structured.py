"""What the text of a request must look like: vLLM's names, validated at birth, compiled in `inference/text/grammar.py`.

The scheduler and the sampler know a grammar as a `Matcher`: which tokens may come next, and what has come.
"""

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ... import RequestError

Kind = Literal["json", "regex", "grammar", "choice"]
KINDS: tuple[Kind, ...] = ("json", "regex", "grammar", "choice")

MAX_CHARS = 2**16
MAX_NESTING = 16
"""Levels of a schema: a map of properties or definitions belongs to the schema that has it."""
MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


class Matcher(Protocol):
    """One choice's place in its grammar. It depends on the committed tokens alone, so nothing else can disturb it."""

    @property
    def accepts(self) -> bool:
        """What has come so far is a whole text of the grammar."""

    @property
    def mask(self) -> bytes:
        """The tokens that may come next: bit t & 7 of byte t >> 3. None at all is a dead end, or the end."""

    @property
    def error(self) -> str:
        """Why nothing can follow, where there is more to say about it."""

    def accept(self, token: int) -> bool:
        """Take a committed token, once; True = the text is whole and nothing can follow it."""


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """A constraint on the text; exactly one of the first four.

    Args:
        json: a JSON Schema, as a dict or as text; kept as text.
        regex: a regular expression (Rust's `regex` syntax: no look-around, no back-references) for the whole text.
        grammar: a context-free grammar as Lark or as GBNF (`root ::= ...`).
        choice: the texts to choose from; kept as a tuple.
        param: what the caller calls this, for errors.

    Raises:
        RequestError: none or several are set, or one can not be what it should be.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    param: str = field(default="structured_outputs", compare=False)

    def __post_init__(self) -> None:
        wanted = [name for name in KINDS if getattr(self, name) is not None]
        if len(wanted) != 1:
            raise self.error(f"({', '.join(wanted) or 'nothing'}) must be one of {', '.join(KINDS)}: set exactly one")
        if self.json is not None:
            object.__setattr__(self, "json", self._schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", self._texts(self.choice))
        text = self.text
        if not isinstance(text, str) or not text:
            raise self.error(f"({text!r}) must be text of at least one character")
        if len(text) > MAX_CHARS:
            raise self.error(f"({len(text)} characters) must not exceed {MAX_CHARS}: make it smaller")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error("holds a lone surrogate: send valid Unicode") from error

    def error(self, rule: str) -> RequestError:
        """What is wrong with the constraint, by the name that its caller knows it by."""
        wanted = [name for name in KINDS if getattr(self, name) is not None]
        where = f"{self.param}.{wanted[0]}" if len(wanted) == 1 and self.param == "structured_outputs" else self.param
        return RequestError(f"{where} {rule}", where)

    @property
    def kind(self) -> Kind:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def text(self) -> str:
        """The constraint as one text; a choice is a JSON list."""
        value = getattr(self, self.kind)
        return json_module.dumps(value, ensure_ascii=False) if self.choice is not None else value

    def _schema(self, schema: object) -> str:
        if isinstance(schema, str):
            if len(schema) > MAX_CHARS:
                return schema  # refused by its length
            try:
                schema = json_module.loads(schema)
            except (ValueError, RecursionError) as error:
                raise self.error(f"is not JSON ({error}): send a JSON Schema") from error
        if not isinstance(schema, dict):
            raise self.error(f"({type(schema).__name__}) must be a JSON Schema: an object")
        if _nesting(schema) > MAX_NESTING:
            raise self.error(f"must not be nested deeper than {MAX_NESTING} levels: flatten it")
        try:
            return json_module.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.error(f"can not be written as JSON ({error}): send a JSON Schema") from error

    def _texts(self, texts: object) -> tuple[str, ...]:
        if (
            not isinstance(texts, list | tuple)
            or not texts
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise self.error("must be a list of texts of at least one character, and not empty")
        return tuple(texts)


def _nesting(schema: dict[str, Any]) -> int:
    """Levels of containers, without recursion; stops counting where there are too many."""
    deepest = 1
    todo: list[tuple[Any, int, bool]] = [(schema, 1, False)]
    while todo and deepest <= MAX_NESTING:
        value, level, is_map = todo.pop()
        deepest = max(deepest, level)
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(child, dict | list | tuple):
                free = not is_map and key in MAPS and isinstance(child, dict)
                todo.append((child, level if free else level + 1, free))
    return deepest
