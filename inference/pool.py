"""Which block manager an engine has: paged, with or without a window, or contiguous."""

from .. import ConfigError
from ..moe.config import ModelConfig
from .config import EngineConfig
from .core.blocks import BlockManager, ContiguousBlocks


def block_manager(model: ModelConfig, config: EngineConfig, fingerprint: bytes) -> BlockManager:
    """The manager of an engine's pool.

    Args:
        model: whether it has an encoder, and windows.
        config: resolved: `max_model_len` and `num_blocks` are numbers.
        fingerprint: model version and KV precision.

    Raises:
        ConfigError: a layout that does not fit the model or the pool.
    """
    assert config.num_blocks is not None, "the KV plan has set it"
    if config.kv_layout == "paged":
        return BlockManager(
            config.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            fingerprint=fingerprint,
            window=common_window(model),
        )
    assert config.max_model_len is not None, "the engine has set it"
    run = -(-config.max_model_len // config.block_size)
    if model.encoder is not None:
        raise ConfigError("kv_layout (contiguous) has no place for an encoder's memory: use paged")
    if config.num_blocks <= run:
        rule = f"must hold one request of max_model_len ({config.max_model_len} tokens) beside the null block"
        raise ConfigError(f"num_blocks ({config.num_blocks}) {rule} with kv_layout=contiguous: use {run + 1}")
    return ContiguousBlocks(config.num_blocks, config.block_size, longest=config.max_model_len)


def common_window(model: ModelConfig) -> int | None:
    """How far the layer that sees most looks back; None = some layer sees everything before it."""
    windows = [model.attention.window_of(layer) for layer in range(model.layers)]
    return None if None in windows else max(window for window in windows if window is not None)
