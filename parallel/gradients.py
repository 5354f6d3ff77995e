"""The gradient of the global batch: its norm and its clip, with every parameter counted exactly once.

After reduction a gradient stands on several ranks: a dense one on all, an expert's on its edp replicas. So

    norm² = Σ over all ranks and parameters of (local square / number of replicas)
    clip  = min(1, max_norm / (norm + 1e-6))

A gradient that is not finite on one rank makes the norm not finite on all: the norm is also the vote.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .mesh import Mesh
from .process import all_sum
from .shard import ShardSpec

EPS = 1e-6


def is_sharded(name: str, parameter: Tensor, shards: Mapping[str, ShardSpec]) -> bool:
    """Whether this rank holds only a part of the parameter (experts spread over ranks)."""
    return name in shards and not shards[name].is_whole(tuple(parameter.shape))


def expert_names(model: nn.Module, shards: Mapping[str, ShardSpec]) -> frozenset[str]:
    """The names of the parameters of which this rank holds a part."""
    return frozenset(name for name, p in model.named_parameters() if is_sharded(name, p, shards))


def global_norm(grads: Iterable[tuple[str, Tensor]], sharded: Callable[[str], bool], mesh: Mesh) -> float:
    """The L2 norm of the whole model's reduced gradient; collective over the world, the same number on every rank.

    Args:
        grads: (name, gradient) of this rank, each parameter once.
        sharded: says of a name whether it is spread over ep (its replicas are the edp ranks only).
        mesh: the layout.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for name, grad in grads:
        square = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        total += square / (mesh.edp_size if sharded(name) else mesh.world)
    return math.sqrt(float(all_sum(total, "sum of the gradient norm")))


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What the gradients are multiplied by: min(1, max_norm / (norm + 1e-6)); 1 without a limit."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + EPS))
