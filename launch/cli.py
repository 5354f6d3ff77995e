"""Command lines of the verbs: leading words, then `key=value`, typed by the verb's own dataclass.

`turnout generate runs/x prompt="Hello, a=b"` gives the words `["runs/x"]` and `prompt="Hello, a=b"`: a setting splits
at its FIRST `=` and its value is taken literally (no YAML, no quoting rules beyond the shell's).
(`turnout train` is composed by Hydra and has Hydra's override grammar instead.)
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import ConfigError
from ..configs.typed import build, parse_literal

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb takes.

    Args:
        json: where to write the verb's result as JSON.
    """

    json: str | None = None


def parse(cls: type[C], args: Sequence[str], words: Sequence[str] | None = None) -> tuple[list[str], C]:
    """Split `args` into the leading words and the dataclass `cls` built from the settings.

    Args:
        cls: the verb's options; a nested dataclass is reached by a dotted key (`engine.block_size=32`).
        args: the command line after the verb.
        words: the names of the words that the verb needs, in order; None: any number is returned as given.

    Raises:
        ConfigError: a missing or unexpected word, an unknown or repeated key, or a value of the wrong type.
    """
    first_setting = next((i for i, arg in enumerate(args) if "=" in arg), len(args))
    positionals, settings = list(args[:first_setting]), args[first_setting:]
    for arg in args:
        if arg.startswith("-") and "=" not in arg:
            raise ConfigError(f"{arg} is not an option: write settings as key=value, as in {_example(cls)}")
    if words is not None and len(positionals) != len(words):
        given, wanted = " ".join(positionals) or "none", " ".join(word.upper() for word in words) or "none"
        raise ConfigError(f"words before the settings ({given}) must be {wanted}: other settings are key=value")
    mapping: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} has no '=': words come before the settings, a setting is key=value")
        _place(mapping, cls, key, text)
    return positionals, build(cls, mapping)


def write_json(path: str | Path | None, result: object) -> None:
    """Write `result` (plain JSON types) to `path`, indented, folders made; None writes nothing.

    JSON has no NaN and no infinity: they become null.
    """
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """The same with None for floats that are no number or infinite."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _place(mapping: dict[str, Any], cls: type, key: str, text: str) -> None:
    """Put the typed value of `key` (dotted for nested groups) where it belongs in `mapping`."""
    *groups, name = key.split(".")
    for group in groups:
        cls = _group(cls, group, key)
        mapping = mapping.setdefault(group, {})
    hints = typing.get_type_hints(cls)
    if name not in hints:
        close = difflib.get_close_matches(name, hints, n=1)
        fix = f"did you mean {'.'.join([*groups, close[0]])}?" if close else "use one of " + ", ".join(sorted(hints))
        raise ConfigError(f"{key} is not a setting: {fix}")
    if name in mapping:
        raise ConfigError(f"{key} ({text}) is given twice: keep one of them")
    mapping[name] = parse_literal(hints[name], text, key)


def _group(cls: type, group: str, key: str) -> type:
    hint = typing.get_type_hints(cls).get(group)
    for option in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option)
    raise ConfigError(f"{key} is not a setting: {group} is no group of settings here")


def _example(cls: type) -> str:
    return f"{dataclasses.fields(cls)[0].name}=VALUE"
