"""Initial weights that do not depend on the layout.

Every matrix is drawn from its own generator, keyed by (seed, parameter name, global expert id), so one rank and eight
expert-parallel ranks start from the same numbers; a rank that holds a part of a matrix draws all of it and keeps that.
Truncated normal at ±2σ, σ = sqrt(s / fan_in), s = 0.1: the smaller scale that keeps sparse models stable (Switch
2101.03961 §2.4, table 3). A router names its own variances; a head is larger by what `logit_scale` takes from it.
"""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...parallel.fsdp import own_parameters
from ...parallel.shard import ShardSpec
from ..layers.experts import Experts
from ..routing.router import Router
from .decoder import Decoder

DENSE_SCALE = 0.1


@torch.no_grad()
def init_weights(
    model: Decoder, seed: int, shards: Mapping[str, ShardSpec] | None = None, names: Collection[str] | None = None
) -> None:
    """Fill parameters in place; norms become one, biases zero. They must be materialised (not on meta).

    Args:
        shards: what `parallelize`, or `fsdp.divide`, returned; None: every matrix is whole.
        names: of those to fill, where the model has them; None = all, and the routers' buffers.
    """
    scale = model.cfg.moe.init_scale if model.cfg.moe else DENSE_SCALE
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    gain = {"embed.weight" if model.cfg.tie_embeddings else "head.weight": model.cfg.logit_scale**-2}
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    for buffer in (buffer for router in routers.values() for buffer in router.buffers() if names is None):
        buffer.zero_()
    for name, weight in own_parameters(model).items():
        if names is not None and name not in names:
            continue
        owner, _, leaf = name.rpartition(".")
        stack, place = stacks.get(owner), shards[name] if shards else None
        if owner in routers:
            _draw(weight, routers[owner].variance(leaf), f"{seed}/{name}")
        elif leaf in ("bias", "sinks", "b_in", "b_out"):
            nn.init.zeros_(weight)
        elif weight.ndim == 1:
            nn.init.ones_(weight)
        elif stack is None:
            fan_in = place.global_shape[1] if place else weight.shape[1]
            _draw(weight, scale / fan_in * gain.get(name, 1.0), f"{seed}/{name}", place)
        else:
            fan_in = model.cfg.width if name.endswith("w_in") else stack.cfg.expert_width
            for local, expert_weight in enumerate(weight):
                first = place.offset[0] if place else stack.first
                _draw(expert_weight, scale / fan_in, f"{seed}/{name}/{first + local}")


def _draw(weight: Tensor, variance: float, key: str, place: ShardSpec | None = None) -> None:
    """Drawn on the CPU in float32, so that every device starts from the same bits; without variance it is zero.

    `place` is that of `weight` in the matrix that is drawn; None: it is the matrix.
    """
    if not variance:
        weight.zero_()
        return
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    std = variance**0.5
    whole = torch.empty(place.global_shape if place else weight.shape)
    nn.init.trunc_normal_(whole, std=std, a=-2 * std, b=2 * std, generator=generator)
    weight.copy_(place.take(whole, tuple(weight.shape)) if place else whole)
