"""Traces of requests: a JSON object a line (or a CSV with a head), as Mooncake, Azure and Vidur publish them.

| field | also called | is |
|---|---|---|
| timestamp | | milliseconds (Mooncake), or a date and time (Azure) |
| arrived_at | | seconds (Vidur) |
| input_length | ContextTokens, num_prefill_tokens | tokens of the prompt |
| output_length | GeneratedTokens, num_decode_tokens, max_tokens | tokens to generate |
| hash_ids | | a number for each 512 tokens of the prompt: equal ones are shared |
| prompt | | the prompt itself, a text or token ids |
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ... import DataError

NAMES: Mapping[str, tuple[str, ...]] = {
    "timestamp": ("timestamp",),
    "seconds": ("arrived_at",),
    "input": ("input_length", "contexttokens", "num_prefill_tokens"),
    "output": ("output_length", "generatedtokens", "num_decode_tokens", "max_tokens"),
    "hashes": ("hash_ids",),
    "prompt": ("prompt",),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One request of a trace.

    Args:
        seconds: when it came, since whenever; None = not said.
        input: tokens of the prompt.
        output: tokens to generate; None = not said.
        hashes: of its blocks.
        prompt: itself; None = only its length is known.
    """

    seconds: float | None
    input: int
    output: int | None
    hashes: tuple[int, ...]
    prompt: tuple[int, ...] | str | None


def lines(path: str) -> list[Line]:
    """All requests of a file.

    Raises:
        DataError: a line that does not read, with its number.
    """
    found = []
    for number, written in _objects(Path(path).expanduser()):
        try:
            found.append(_line({name.lower(): value for name, value in written.items() if value not in (None, "")}))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return found


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(text.splitlines()), 2)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: is no JSON object ({error})") from error


def _line(written: dict[str, Any]) -> Line:
    found = {kind: next((written[n] for n in names if n in written), None) for kind, names in NAMES.items()}
    prompt = tuple(found["prompt"]) if isinstance(found["prompt"], list) else found["prompt"]
    ids = prompt is None or isinstance(prompt, str) or all(type(one) is int for one in prompt)
    if not ids or prompt in ("", ()):
        raise ValueError("prompt must be a text or token ids, not empty")
    if prompt is None and found["input"] is None:
        raise ValueError("needs input_length or prompt")
    line = Line(
        seconds=_seconds(found["timestamp"], found["seconds"]), input=int(found["input"] or 0),
        output=None if found["output"] is None else int(found["output"]),
        hashes=tuple(map(int, found["hashes"] or ())), prompt=prompt,
    )  # fmt: skip
    if (prompt is None and line.input < 1) or (line.output is not None and line.output < 1):
        raise ValueError("lengths must be at least 1")
    return line


def _seconds(timestamp: object, seconds: object) -> float | None:
    if timestamp is None:
        found = None if seconds is None else float(str(seconds))
    else:
        try:
            found = float(str(timestamp)) / 1000
        except ValueError:
            found = datetime.fromisoformat(str(timestamp)).replace(tzinfo=UTC).timestamp()
    if found is not None and not math.isfinite(found):
        raise ValueError("the time must be finite")
    return found
