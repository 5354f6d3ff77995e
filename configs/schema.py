"""Hydra's ConfigStore, filled from the dataclasses: what a group knows, and its defaults, is said in one place."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from hydra.core.config_store import ConfigStore

from .typed import to_dict

MISSING = "???"


def defaults(cls: type) -> dict[str, Any]:
    """The fields of a dataclass with their plain defaults; `???` where a value must be given."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, cls)):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = MISSING
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = to_dict(value)
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def register(groups: Mapping[str, type]) -> None:
    """Store `defaults(cls)` as option `schema` of each group, from which the group's YAML files begin."""
    store = ConfigStore.instance()
    for group, cls in groups.items():
        store.store(group=group, name="schema", node=defaults(cls), provider="turnout")


def known_keys(groups: Mapping[str, type], root: Iterable[str]) -> list[str]:
    """Every key of the composed configuration, dotted, the groups' own names included."""
    own = tuple(groups.values())  # a group within another is written under its own name
    return [*root, *groups, *(f"{group}.{key}" for group, cls in groups.items() for key in _keys(cls, own))]


def _keys(cls: type, own: tuple[type, ...]) -> Iterator[str]:
    """The fields of a dataclass; those that are dataclasses, or null, with their own fields behind a dot."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cast(Any, cls)):
        yield field.name
        for option in (hints[field.name], *typing.get_args(hints[field.name])):
            nested = dataclasses.is_dataclass(option) and isinstance(option, type)
            if nested and not any(issubclass(cls, option) for cls in own):
                yield from (f"{field.name}.{key}" for key in _keys(option, own))
