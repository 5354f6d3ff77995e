"""The gradient of the global batch: its norm and its clip, with every parameter counted exactly once.

After reduction a gradient stands on every rank that holds the same slice (`ShardSpec.along`). So

    norm² = Σ over all ranks and parameters of (local square / number of replicas)
    clip  = min(1, max_norm / (norm + 1e-6))

A gradient that is not finite on one rank makes the norm not finite on all: the norm is also the vote.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import square_sum
from .process import all_sum

EPS = 1e-6
BUCKET = 2**24  # numbers that are summed at once


def global_norm(grads: Iterable[tuple[Tensor, int]], device: torch.device) -> float:
    """The L2 norm of the whole model's reduced gradient; collective over the world, the same number on every rank.

    Args:
        grads: this rank's gradients, each with the number of ranks that hold the same one.
        device: where to add up.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad, replicas in grads:
        total += square_sum(grad) / replicas
    return math.sqrt(float(all_sum(total, "sum of the gradient norm")))


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What the gradients are multiplied by: min(1, max_norm / (norm + 1e-6)); 1 without a limit."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + EPS))


def sum_in_buckets(grads: Sequence[Tensor], group: dist.ProcessGroup, numbers: int = BUCKET) -> None:
    """SUM every gradient over a group's ranks, in place, in flat float32 (float64 stays) pieces. Collective."""
    first = 0
    while first < len(grads):
        end, held = first + 1, grads[first].numel()
        while end < len(grads) and held + grads[end].numel() <= numbers:
            held, end = held + grads[end].numel(), end + 1
        some = grads[first:end]
        flat = torch.cat([widen(grad).flatten() for grad in some])
        dist.all_reduce(flat, group=group)
        for grad, total in zip(some, flat.split([grad.numel() for grad in some]), strict=True):
            grad.copy_(total.view_as(grad))
        first = end


def widen(tensor: Tensor) -> Tensor:
    """In the dtype in which gradients are summed."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
