"""Typed, frozen configuration: dataclasses built strictly from plain mappings.

Hydra composes YAML into a plain mapping; `build` turns it into a dataclass and refuses what does not fit, naming the
field, the value, the rule and the fix. No torch and no omegaconf here: a bad config is answered in a blink.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .. import ConfigError

C = TypeVar("C")


def check(condition: bool, field: str, value: object, rule: str, fix: str) -> None:
    """Raise `ConfigError("<field> (<value>) <rule>: <fix>")` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field} ({value}) {rule}: {fix}")


def build(cls: type[C], data: Mapping[str, Any], path: str = "") -> C:
    """Build the dataclass `cls` from `data`.

    Args:
        cls: a dataclass whose annotations are bool, int, float, str, Literal, `X | None`, tuple[X, ...] or dataclasses.
        data: field name → plain value (what YAML or JSON gives). An int is accepted where a float is wanted.
        path: where `data` stands in the whole configuration, for messages (`moe`).

    A field with `metadata={"auto": True}` takes null too: its class fills in the value.

    Raises:
        ConfigError: an unknown or missing field, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{path or cls.__name__} ({data!r}) must be a group of settings: use {path or 'key'}.<field>=value"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{_join(path, str(key))} is not a setting: {_suggest(str(key), list(fields), path)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data and data[name] is None and field.metadata.get("auto"):
            values[name] = None
        elif name in data:
            values[name] = _convert(hints[name], data[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)} is missing: give it a value ({_describe(hints[name])})")
    return cls(**values)


def check_choices(config: object, path: str) -> None:
    """Refuse a field whose annotation lists its values and whose value is another: Python callers pass no `build`.

    Raises:
        ConfigError: naming the field, the value and the options.
    """
    for name, annotation in _choices(typing.cast(Any, type(config))).items():
        _convert(annotation, getattr(config, name), _join(path, name))


@functools.cache
def _choices(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {n: a for n, a in hints.items() if any(typing.get_origin(o) is typing.Literal for o in _options(a))}


def to_dict(config: object) -> dict[str, Any]:
    """The dataclass as plain JSON types, nested, in field order: `build(type(c), to_dict(c)) == c`."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(typing.cast(Any, config))))
    return plain


def digest(config: object) -> str:
    """The sha256 of the canonical JSON of `config` (a dataclass or plain JSON types), as 64 hexadecimal digits."""
    plain = to_dict(config) if dataclasses.is_dataclass(config) else config
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_literal(annotation: Any, text: str, path: str) -> Any:
    """One command-line value as the type `annotation` says; `null` is None where None is allowed.

    Raises:
        ConfigError: the text does not read as that type.
    """
    options = _options(annotation)
    if type(None) in options and text in ("null", "none", "None"):
        return None
    for option in options:
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if option is str or typing.get_origin(option) is typing.Literal:
            return _convert(annotation, text, path)
        if typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            return tuple(parse_literal(inner, part, path) for part in text.split(",") if part)
    raise ConfigError(f"{path} ({text!r}) must be {_describe(annotation)}: correct the value")


def _convert(annotation: Any, value: Any, path: str) -> Any:
    for option in _options(annotation):
        if option is type(None):
            if value is None:
                return None
        elif dataclasses.is_dataclass(option):
            if isinstance(value, typing.cast(type, option)):
                return value
            if isinstance(value, Mapping):
                return build(typing.cast(type, option), value, path)
        elif typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is tuple:
            if isinstance(value, Sequence) and not isinstance(value, str):
                inner = typing.get_args(option)[0]
                return tuple(_convert(inner, item, f"{path}[{i}]") for i, item in enumerate(value))
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif isinstance(value, option):
            return value
    choices = [
        str(a) for o in _options(annotation) if typing.get_origin(o) is typing.Literal for a in typing.get_args(o)
    ]
    fix = _suggest(str(value), choices, "") if choices else "correct the value"
    raise ConfigError(f"{path} ({value!r}) must be {_describe(annotation)}: {fix}")


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def _describe(annotation: Any) -> str:
    words = {type(None): "null", int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    parts = []
    for option in _options(annotation):
        if typing.get_origin(option) is typing.Literal:
            parts.append("one of " + ", ".join(str(a) for a in typing.get_args(option)))
        elif typing.get_origin(option) is tuple:
            parts.append(f"a list, each {_describe(typing.get_args(option)[0])}")
        else:
            parts.append(words.get(option, "a group of settings"))
    return " or ".join(parts)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _suggest(word: str, known: list[str], path: str) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {_join(path, close[0])}?" if close else "use one of " + ", ".join(sorted(known))
