"""What a family of foreign checkpoints is: a table of names and places, and a mapping of its configuration."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ... import ConfigError
from ..config import ModelConfig, MoEConfig
from .computed import computed
from .keys import Keys
from .place import Place

FREQUENCIES = "*.rotary_emb.inv_freq"  # which older checkpoints hold


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face.

    Args:
        name: their `model_type`.
        architecture: their class, as `architectures` of config.json names it.
        read: their configuration → ours. Raises ConfigError where we can not compute the same.
        write: ours → theirs, without the keys that `to_theirs` adds. Raises ConfigError where they can not compute it.
        places: where their tensors lie in ours.
        ignored: name patterns (as in file names) of tensors that say nothing: buffers, heads that are tied; `{layers}`
            stands for how many layers the model has.
        packed: the `quant_method` that is undone while reading; all others are refused.
        variant: the family as one config.json has it, where it also says where the tensors lie; None = always alike.
    """

    name: str
    architecture: str
    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    places: Callable[[ModelConfig], Iterable[Place]]
    ignored: tuple[str, ...] = (FREQUENCIES,)
    packed: str | None = None
    variant: "Callable[[Mapping[str, Any]], Family] | None" = None

    def of(self, data: Mapping[str, Any]) -> "Family":
        """The family as this config.json has it."""
        return self if self.variant is None else self.variant(data)

    def to_theirs(self, cfg: ModelConfig, dtype: str) -> dict[str, Any]:
        """The whole config.json.

        Raises:
            ConfigError: read again it would compute something else; what can not be said is named.
        """
        kind = {"model_type": self.name, "architectures": [self.architecture], "dtype": dtype}
        written = kind | self.write(cfg)
        said, meant = computed(self.read(Keys(written))), computed(cfg)
        lost = [name for name in sorted(said.keys() | meant.keys()) if said.get(name) != meant.get(name)]
        if lost:
            telling = [name for name in lost if name in said and name in meant] or lost[:3]
            told = ", ".join(f"{name} ({meant.get(name)}, there {said.get(name)})" for name in telling)
            raise ConfigError(f"{told} can not be said in a {self.name}: choose another family, or keep it in turnout")
        return written


def needs_moe(cfg: ModelConfig) -> MoEConfig:
    """The model's mixture of experts.

    Raises:
        ConfigError: it has none.
    """
    if cfg.moe is None:
        raise ConfigError("model.moe (null) must be set for a family of mixtures of experts: choose llama or qwen3")
    return cfg.moe


MODULES: Mapping[str, str] = {
    "gpt_oss": "gpt_oss",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
    "qwen2": "qwen",
    "qwen2_moe": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
    "olmoe": "olmoe",
    "switch_transformers": "switch_transformers",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
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


def families() -> list[Family]:
    """All of them."""
    return [family(name) for name in MODULES]


def fitting(cfg: ModelConfig) -> Family:
    """The first family that can compute the model.

    Raises:
        ConfigError: none can; each says why not.
    """
    reasons = []
    for kind in families():
        try:
            kind.to_theirs(cfg, "float32")
        except ConfigError as error:
            reasons.append(f"{kind.name}: {error}")
        else:
            return kind
    raise ConfigError("no family can compute this model, keep it in turnout. " + " | ".join(reasons))
