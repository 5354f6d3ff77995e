"""Hydra's ConfigStore, filled from the dataclasses: what a group knows, and its defaults, is said in one place."""

import dataclasses
from collections.abc import Iterable, Mapping
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
    keys = [f"{group}.{field.name}" for group, cls in groups.items() for field in dataclasses.fields(cast(Any, cls))]
    return [*root, *groups, *keys]
