"""What is done to one block, and what becomes of the configuration. F output width, D input width, E experts."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import QuantizedWeight
from ..config import ModelConfig
from ..layers.block import Block
from ..layers.quantized import QuantizedExperts, QuantizedLinear, matrices, round_to, stacks
from ..quantization_config import QuantizationConfig
from .config import CompressConfig
from .watch import Met

Notes = dict[str, Any]


def target(cfg: ModelConfig, how: CompressConfig) -> ModelConfig:
    """The configuration of the compressed model.

    Raises:
        ConfigError: the model can not become that.
    """
    return cfg if how.quantization is None else replace(cfg, quantization=how.quantization)


@torch.no_grad()
def compress_block(block: Block, met: Met, how: CompressConfig) -> Notes:
    """Change `block` in place.

    Args:
        block: of whole weights, float32.
        met: what its matrices met; empty where the method needs no text.
        how: what to do.

    Returns:
        by matrix, what there is to tell.
    """
    assert how.quantization is not None
    return round_block(block, how.quantization, met, how)


def round_block(block: Block, cfg: QuantizationConfig, met: Met, how: CompressConfig) -> Notes:
    """Put rounded layers in the places of whole ones."""
    for name, linear in list(matrices(block)):
        block.set_submodule(name, QuantizedLinear(round_to(linear.weight, cfg), linear.bias))
    for name, experts in list(stacks(block)):
        w_in = stacked([round_to(w_FD, cfg) for w_FD in experts.w_in])
        w_out = stacked([round_to(w_FD.mT, cfg) for w_FD in experts.w_out])
        block.set_submodule(name, QuantizedExperts(experts, w_in, w_out))
    return {}


def stacked(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Matrices of one form as a stack."""
    first = parts[0]
    whole: dict[str, Any] = {
        field.name: torch.stack([getattr(part, field.name) for part in parts])
        for field in fields(first)
        if isinstance(value := getattr(first, field.name), Tensor) and value.numel()
    }
    return replace(first, **whole)
