"""Fewer layers: a student that starts from some of its teacher's blocks (DistilBERT 1910.01108 §3).

    student = shallower(cfg, spread(cfg, 6))

Blocks keep their order; embedding, head, norms and an encoder stay as they are.
"""

from collections.abc import Sequence
from dataclasses import replace

from ...configs.typed import check
from ..config import ModelConfig, MoEConfig


def spread(cfg: ModelConfig, layers: int) -> tuple[int, ...]:
    """Ids of so many decoder blocks, evenly spaced from the first on: of 12 to 6, every other (DistilBERT).

    Dense and sparse blocks are spaced each among their own, so that the student has both in the same proportion: every
    other block of a model whose every other block is sparse would have one kind alone.

    Raises:
        ConfigError: `layers` is below 1 or above the model's.
    """
    check(1 <= layers <= cfg.layers, "layers", layers, f"must lie in 1 to model.layers ({cfg.layers})", "lower it")
    sparse = [layer for layer in range(cfg.layers) if layer in cfg.moe_layers]
    dense = [layer for layer in range(cfg.layers) if layer not in cfg.moe_layers]
    many = max(round(layers * len(sparse) / cfg.layers), 1) if sparse else 0
    return tuple(sorted([*_evenly(sparse, many), *_evenly(dense, layers - many)]))


def shallower(cfg: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """The configuration of a model that has the decoder blocks `kept` alone.

    Args:
        cfg: the teacher's.
        kept: ids, ascending; block kept[i] becomes block i.

    Raises:
        ConfigError: ids that are not the model's in ascending order, or a hash router, whose fixed choice depends on
            its layer's id, in a block whose id changes.
    """
    rule = f"must be ids of model.layers ({cfg.layers}), each once and in ascending order"
    fits = bool(kept) and list(kept) == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < cfg.layers
    check(fits, "layers", list(kept), rule, f"use {list(range(cfg.layers))[::2]}")
    if len(kept) == cfg.layers:
        return cfg
    attention = cfg.attention
    if attention.window_layers is not None:
        attention = replace(attention, window_layers=_moved(attention.window_layers, kept))
    return replace(cfg, layers=len(kept), attention=attention, moe=_sparse(cfg, kept))


def _sparse(cfg: ModelConfig, kept: Sequence[int]) -> MoEConfig | None:
    """The experts of the student, in the blocks that had them; None where no sparse block is left."""
    if cfg.moe is None:
        return None
    listed, encoder = _moved(cfg.moe_layers, kept), [layer for layer in cfg.moe_layers if layer >= cfg.layers]
    stay = all(kept[layer] == layer for layer in listed) and (not encoder or len(kept) == cfg.layers)
    rule = "chooses by the layer's id, and dropping layers changes that of a sparse one"
    check(cfg.moe.router != "hash" or stay, "moe.router", "hash", rule, "drop layers behind the last sparse one only")
    if not (listed or encoder):
        return None
    return replace(cfg.moe, sparse_layers=listed)


def _moved(layers: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """The new ids of those of `layers` that are kept."""
    return tuple(new for new, old in enumerate(kept) if old in layers)


def _evenly(layers: Sequence[int], count: int) -> list[int]:
    return [layers[i * len(layers) // count] for i in range(count)]
