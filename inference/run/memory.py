"""The plan of a server's memory, made before it is allocated: weights, the worst step, the KV cache.

Pages and activations are touched little by little, so a server that is too large would start and be killed later. What
the plan allows never runs out; what it does not is refused with the numbers.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import ConfigError
from ...kernels.cpp.attention import attends_in_place
from ...kernels.registry import compiles
from ...moe.config import ModelConfig
from ..config import EngineConfig
from .activations import Activations
from .experts import page_bytes
from .kv import MIB, KVPlan, plan_kv

SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of what is free once the weights are there, for a cache that is sized by it: a CPU server is rarely alone."""
WORKSPACE = 32 * MIB
"""What libraries set aside for packed operands, and allocators between blocks."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a server holds at most, in bytes.

    Attributes:
        weights: the model's, allocated already.
        activations: of the worst step: every token of the budget at its longest, all of them to one rank's experts.
        kv: the cache.
        routing: beside it, where every cached token went.
        free: of the device with its weights, before the rest is allocated.
    """

    weights: int
    activations: int
    kv: KVPlan
    routing: int
    free: int

    @property
    def cache(self) -> int:
        """Everything that is kept by block."""
        return self.kv.total_bytes + self.routing

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.cache

    def fits(self, limit: int) -> bool:
        """Whether what is not there yet takes no more than `limit` bytes."""
        return self.activations + self.cache <= limit

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as `turnout serve` and `turnout generate` write them."""
        return {
            "weights_bytes": self.weights,
            "activations_bytes": self.activations,
            "cache_bytes": self.cache,
            "total_bytes": self.total,
            "free_bytes": self.free,
            "kv_blocks": self.kv.num_blocks,
            "kv_tokens": self.kv.tokens,
            "kv_dtype": str(self.kv.dtype).removeprefix("torch."),
            "kv_set_by": self.kv.limit,
        }

    def __str__(self) -> str:
        parts = f"weights {_mib(self.weights)} + a step {_mib(self.activations)} + cache {_mib(self.cache)}"
        return f"memory: {parts} = {_mib(self.total)}, free beside the weights {_mib(self.free)}; {self.kv}"


def plan_memory(
    model: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype, weights: int, free: int,
    device: str = "cpu", ranks: int = 1, tp: int = 1, replicas: int = 1,
) -> MemoryPlan:  # fmt: skip
    """Size everything.

    Args:
        model: the model's shapes.
        config: what it says of the cache's size is kept to, or refused.
        max_model_len: the longest sequence, in tokens.
        dtype: of the weights.
        weights: their bytes.
        free: bytes that are left on the device beside them.
        device: the kind of device.
        ranks: expert-parallel ranks.
        tp: ranks that divide the heads.
        replicas: that rank 0 samples for.

    Raises:
        ConfigError: it does not fit.
    """

    each = page_bytes(model, config.block_size, counted=config.moe_capacity == "trained")
    shape: dict[str, Any] = {"model": model, "config": config, "dtype": dtype, "ranks": ranks, "tp": tp}
    in_place = device == "cpu" and compiles(config.form) and attends_in_place(dtype)

    def plan(kv: KVPlan) -> MemoryPlan:
        length = min(max_model_len, kv.tokens)
        worst = Activations(length=length, replicas=replicas, in_place=in_place, **shape)
        step, routing = worst.total + WORKSPACE, kv.num_blocks * each
        return MemoryPlan(weights=weights, activations=step, kv=kv, routing=routing, free=free)

    fixed = config.num_blocks is not None or config.kv_memory_mb is not None
    limit = free if fixed else int(free * SHARE[device])
    kv = plan_kv(model, config, max_model_len, dtype, limit, tp)
    if not fixed and not plan(kv).fits(limit):

        def too_many(blocks: int) -> bool:
            return not plan(replace(kv, num_blocks=blocks)).fits(limit)

        blocks = 1 + bisect_left(range(2, kv.num_blocks), True, key=too_many)
        kv = replace(kv, num_blocks=max(blocks, 2), limit="free memory")
    found = plan(kv)
    if not found.fits(limit):
        needs = f"a step {_mib(found.activations)} + cache {_mib(found.cache)}"
        have = f"{_mib(limit)} of the {_mib(free)} that are free beside the weights"
        smaller = "kv_memory_mb" if config.num_blocks is None else "num_blocks"
        fix = f"lower max_num_batched_tokens, max_num_seqs, max_model_len or {smaller}"
        raise ConfigError(f"memory ({needs}) must not exceed {have}: {fix}")
    return found


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"
