"""The optimizer step of reduced gradients: norm, vote, clip, optimizers, the same on every rank."""

import math
from collections.abc import Callable

from ..fsdp import own_parameters
from ..gradients import clip_coefficient, global_norm
from .engine import Engine, StepResult


def clip_and_step(engine: Engine, replicas: Callable[[str], int]) -> StepResult:
    """Vote, clip and step; the gradients are dropped either way. Collective.

    Args:
        replicas: parameter name → how many ranks of the world hold this rank's slice of it.
    """
    parameters = own_parameters(engine.model)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if engine.scale is not None:
        engine.scale.unscale(grads.values())
    norm = global_norm(((grad, replicas(name)) for name, grad in grads.items()), engine.mesh.device)
    finite = math.isfinite(norm)
    coefficient = clip_coefficient(norm, engine.clip) if finite else 0.0
    if finite:
        for grad in grads.values():
            if coefficient < 1.0:
                grad.mul_(coefficient)
        for optimizer in engine.optimizers:
            optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None
    rescaled = engine.scale is not None and engine.scale.update(finite)
    return StepResult(norm, coefficient, finite, rescaled)
