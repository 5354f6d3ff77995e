"""The KV cache's tensors and how large they are.

The size is planned first, as data that can be printed and tested, then allocated. Keys and values of a layer are
[num_blocks, block_size, G, d]: G kv heads, d head size. Of latent attention only the latents are kept. Pages of int8
have float32 scales [num_blocks, block_size, G] beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ConfigError
from ...kernels.memory import populate, zeros
from ...kernels.paging import copy_blocks
from ...moe.config import ModelConfig
from ...moe.shapes import KVForm
from ..config import EngineConfig

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """How many blocks there are and why.

    Attributes:
        num_blocks: the null block included.
        bytes_per_block: keys and values of all layers, and their scales.
        limit: what set the number: `num_blocks`, `kv_memory_mb`, `max_num_seqs` (every sequence fits at its longest)
            or `free memory`.
    """

    num_blocks: int
    block_size: int
    form: KVForm
    dtype: torch.dtype
    limit: str

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * bytes_per_token(self.form, self.dtype)

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds; the null block holds none."""
        return (self.num_blocks - 1) * self.block_size

    def __str__(self) -> str:
        return (
            f"KV cache: {self.num_blocks} blocks of {self.block_size} tokens, {self.tokens} tokens, "
            f"{self.total_bytes / MIB:.1f} MiB as {str(self.dtype).removeprefix('torch.')} (set by {self.limit})"
        )


def plan_kv(
    model: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype, free_bytes: int, tp: int = 1
) -> KVPlan:
    """Size the KV cache.

    Args:
        model: the model's shapes.
        config: `num_blocks` wins, then `kv_memory_mb`; without both every sequence fits at its longest, as far as
            memory goes.
        max_model_len: the longest sequence, in tokens; with an encoder also its longest input.
        dtype: of keys and values, if `config.kv_dtype` does not say otherwise.
        free_bytes: what the cache may take.
        tp: ranks that divide the heads.

    Raises:
        ConfigError: not even one usable block beside the null block fits, or latents should be kept as int8.
    """
    if config.kv_dtype == "int8":
        if model.attention.latent is not None:
            rule = "latents and rotated keys differ in range and would share a scale"
            raise ConfigError(f"kv_dtype (int8) must be auto for latent attention: {rule}")
        dtype = torch.int8
    size = config.block_size
    form = KVForm.of(model, tp)
    each = size * bytes_per_token(form, dtype)
    tables = 1 if model.encoder is None else 2
    wanted = 1 + config.max_num_seqs * tables * -(-max_model_len // size)
    if config.num_blocks is not None:
        num_blocks, limit = config.num_blocks, "num_blocks"
    elif config.kv_memory_mb is not None:
        num_blocks, limit = config.kv_memory_mb * MIB // each, "kv_memory_mb"
    elif wanted * each <= free_bytes:
        num_blocks, limit = wanted, "max_num_seqs"
    else:
        num_blocks, limit = free_bytes // each, "free memory"
    if num_blocks < 2:
        have = config.kv_memory_mb if limit == "kv_memory_mb" else free_bytes // MIB
        fix = f"use kv_memory_mb={-(-2 * each // MIB)} or more, or a smaller block_size"
        raise ConfigError(f"{limit} ({have} MiB) must hold 2 blocks of {each / MIB:.2f} MiB: {fix}")
    return KVPlan(
        num_blocks=num_blocks,
        block_size=size,
        form=form,
        dtype=dtype,
        limit=limit,
    )


def bytes_per_token(form: KVForm, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers; int8 has a float32 scale for each key and each value of a head."""
    scales = 2 * form.layers * form.heads * torch.float32.itemsize if dtype == torch.int8 else 0
    return form.numbers * dtype.itemsize + scales


class KVCache:
    """Keys and values of all layers; `layer(i)` gives one layer's pages, which `store_kv` writes in place.

    Attributes:
        pages: every tensor [layers, num_blocks, ...] that a block has a part in; what else is kept by block joins it.
    """

    def __init__(self, plan: KVPlan, device: torch.device) -> None:
        self.plan, form = plan, plan.form
        pages = (form.layers, plan.num_blocks, plan.block_size, form.heads)
        self.keys = zeros((*pages, form.key_dim), plan.dtype, device)
        self.values = (
            self.keys[..., : form.value_dim] if form.shared else zeros((*pages, form.value_dim), plan.dtype, device)
        )
        self.key_scales, self.value_scales = (
            zeros(pages, torch.float32, device) if plan.dtype == torch.int8 else None for _ in range(2)
        )
        own = (self.keys, None if form.shared else self.values, self.key_scales, self.value_scales)
        self.pages: list[Tensor] = [tensor for tensor in own if tensor is not None]

    def populate(self, tokens: int) -> None:
        """Take the memory of the blocks that the first so many tokens will lie in; any thread may call it."""
        count = min(-(-tokens // self.plan.block_size) + 1, self.plan.num_blocks)
        for tensor in self.pages:
            for layer in range(tensor.shape[0]):
                populate(tensor[layer, :count])

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values), each [num_blocks, block_size, G, d]."""
        return self.keys[layer], self.values[layer]

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """(of the keys, of the values), each [num_blocks, block_size, G]; None where pages hold the numbers."""
        if self.key_scales is None or self.value_scales is None:
            return None, None
        return self.key_scales[layer], self.value_scales[layer]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to), all of them as they are now."""
        if not pairs:
            return
        sources_N, targets_N = torch.tensor(pairs, dtype=torch.int64, device=self.keys.device).T
        for tensor in self.pages:
            copy_blocks(tensor, sources_N, targets_N)
