"""From a rank's gradients to an optimizer step, the same on every rank: sum, norm, vote, clip, optimizers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..fsdp import own_parameters
from ..gradients import clip_coefficient, global_norm, sum_in_buckets
from ..mesh import Dimension, Mesh
from ..process import naming
from ..shard import ShardSpec
from .engine import Engine, StepResult


class ScaledOptimizer(Optimizer, ABC):
    """One that multiplies gradients itself, as it reads them."""

    @abstractmethod
    def step(self, closure: None = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """Move every parameter by `scale` times its gradient, which may be lost."""


def sum_replicas(
    parameters: Mapping[str, nn.Parameter], shards: Mapping[str, ShardSpec], mesh: Mesh, tied: Collection[str] = ()
) -> None:
    """SUM every gradient over the ranks that hold the same slice, in flat pieces. Collective.

    What no token reached has a gradient of zeros, so that every layout decays and steps it alike.

    Args:
        parameters: what this rank holds.
        tied: those that the first and the last stage of a pipeline both hold; summed over these at last.
    """
    along: dict[Dimension, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        along.setdefault(shards[name].along, []).append(parameter.grad)
    ends = [grad for name in tied if name in parameters and (grad := parameters[name].grad) is not None]
    with naming("sum of the gradients"):
        for dim, grads in [*along.items(), ("ends", ends)]:
            if grads and mesh.size(dim) > 1:
                sum_in_buckets(grads, mesh.group(dim))


def clip_and_step(engine: Engine, replicas: Callable[[str], int]) -> StepResult:
    """Vote, clip and step; the gradients are dropped either way. Collective.

    Args:
        replicas: parameter name → how many ranks of the world hold this rank's slice of it.
    """
    parameters = own_parameters(engine.model)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if engine.scale is not None:
        engine.scale.unscale(grads.values())
    for name in engine.keeps_zeros.intersection(grads):
        grads[name].mul_(parameters[name] != 0)
    norm = global_norm(((grad, replicas(name)) for name, grad in grads.items()), engine.mesh.device)
    finite = math.isfinite(norm)
    coefficient = clip_coefficient(norm, engine.clip) if finite else 0.0
    if finite:
        for optimizer in engine.optimizers:
            _step(optimizer, coefficient)
    for parameter in parameters.values():
        parameter.grad = None
    rescaled = engine.scale is not None and engine.scale.update(finite)
    return StepResult(norm, coefficient, finite, rescaled)


def _step(optimizer: Optimizer, coefficient: float) -> None:
    """Step by `coefficient` times the gradients."""
    if isinstance(optimizer, ScaledOptimizer):
        optimizer.step(scale=coefficient)
        return
    if coefficient < 1.0:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                parameter.grad.mul_(coefficient)
    optimizer.step()
