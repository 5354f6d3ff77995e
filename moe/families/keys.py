"""A foreign config.json, read strictly: what is not read, and not known to change nothing, is listed."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ... import ConfigError

V = TypeVar("V")

# What decides nothing that a trained model computes: names, versions, training, caches, generation.
HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype",
        "initializer_range", "is_decoder", "model_type", "output_attentions", "output_hidden_states",
        "is_llama_config", "output_router_logits", "pad_token_id", "pretraining_tp", "return_dict", "sep_token_id",
        "torch_dtype", "transformers.js_config", "unk_token_id", "_attn_implementation_autoset",
        "transformers_version", "use_cache",
    }
)  # fmt: skip


class Keys:
    """One config.json, or what says the same, while it is read.

    Attributes:
        data: the whole of it.
        source: its name in messages.
    """

    def __init__(self, data: Mapping[str, Any], source: str = "config.json") -> None:
        self.data = data
        self.source = source
        self._read: set[str] = set()

    def get(self, name: str, default: V | None = None) -> Any:
        """The value; `default` where it is missing or null.

        Raises:
            ConfigError: it is missing and there is no default.
        """
        self._read.add(name)
        value = self.data.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{name} (missing) must be in {self.source}: copy the model's own again")
        return value

    def maybe(self, name: str) -> Any:
        """The value; None where it is missing."""
        self._read.add(name)
        return self.data.get(name)

    def only(self, name: str, allowed: Sequence[Any], default: Any) -> Any:
        """The value, which must be one of `allowed`, for the others are not computed here.

        Raises:
            ConfigError: it is another.
        """
        value = self.get(name, default)
        if value not in allowed:
            known = " or ".join(map(str, allowed))
            raise ConfigError(f"{name} ({value}) of {self.source} must be {known}: other models are not computed here")
        return value

    @property
    def unknown(self) -> list[str]:
        """What nobody has read and nobody knows to be harmless."""
        return sorted(self.data.keys() - self._read - HARMLESS)
