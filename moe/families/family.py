"""What a family of foreign checkpoints is: a table of names and places, and a mapping of its configuration."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ... import ConfigError
from ..config import ModelConfig
from .keys import Keys
from .place import Place


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face.

    Args:
        name: their `model_type`.
        architecture: their class, as `architectures` of config.json names it.
        read: their configuration → ours. Raises ConfigError where we can not compute the same.
        write: ours → theirs, without the keys that `to_theirs` adds. Raises ConfigError where they can not compute it.
        places: where their tensors lie in ours.
        ignored: name patterns (as in file names) of tensors that say nothing: buffers, heads that are tied.
    """

    name: str
    architecture: str
    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    places: Callable[[ModelConfig], Iterable[Place]]
    ignored: tuple[str, ...] = ()

    def to_theirs(self, cfg: ModelConfig, dtype: str) -> dict[str, Any]:
        """The whole config.json."""
        kind = {"model_type": self.name, "architectures": [self.architecture], "dtype": dtype}
        return kind | self.write(cfg)


MODULES: Mapping[str, str] = {
    "llama": "llama",
}


def family(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ConfigError: there is none.
    """
    if model_type not in MODULES:
        known = ", ".join(MODULES)
        raise ConfigError(f"model_type ({model_type}) must be one that can be read: use a model of {known}, or turnout")
    found: Family = getattr(import_module(f".{MODULES[model_type]}", __package__), model_type.upper())
    return found
