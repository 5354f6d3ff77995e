"""Sliding windows as Hugging Face spells them: one size, and which layers have it."""

from collections.abc import Callable
from typing import Any

from ..config import ModelConfig
from .keys import Keys


def read_windows(keys: Keys, limited: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """AttentionConfig's arguments for `use_sliding_window`, `sliding_window` and `layer_types` (Qwen).

    Args:
        keys: their configuration.
        limited: whether a layer has the window where `layer_types` is missing; None = the family knows no
            `layer_types`, and every layer has it.
    """
    size, kinds = keys.maybe("sliding_window"), keys.maybe("layer_types") if limited else None
    layers = range(keys.get("num_hidden_layers"))
    if not keys.get("use_sliding_window", False) or not size:
        return {}
    if limited is None:
        return {"window": size}
    chosen = tuple(i for i in layers if (kinds[i] == "sliding_attention" if kinds else limited(i)))
    return {"window": size, "window_layers": chosen} if chosen else {}


def write_windows(cfg: ModelConfig) -> dict[str, Any]:
    """The keys that `read_windows` reads."""
    window = cfg.attention.window
    return {"use_sliding_window": window is not None, "sliding_window": window}


def layer_types(cfg: ModelConfig) -> list[str]:
    """Which layers have the window, by name."""
    windows = [cfg.attention.window_of(layer) for layer in range(cfg.layers)]
    return ["full_attention" if window is None else "sliding_attention" for window in windows]
