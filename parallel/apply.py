"""Apply a model's plan to a mesh: keep this rank's experts, put the all-to-all between router and experts, and divide
the layers that tensor-parallel ranks compute together.

The model knows nothing of it: its experts merely hold fewer of the stacked tensors, and its dispatcher is another
plain object; its divided layers have smaller matrices, and hooks around them. Works on the meta device too, so that no
rank ever holds all experts.

E experts of a layer.
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from .. import ConfigError
from .dispatch.all_to_all import AllToAllDispatcher
from .dispatch.parts import shares
from .dispatch.traffic import Traffic
from .mesh import Mesh
from .plan import match
from .shard import ShardSpec
from .tensor import divide


def parallelize(model: nn.Module, mesh: Mesh, *, uneven: bool = False) -> dict[str, ShardSpec]:
    """Spread `model` over `mesh`, in place.

    Every module that has `experts` and `dispatcher` gets `experts.first` (global id of its first local expert) and,
    when experts are spread, an `AllToAllDispatcher`. Parameters of a sliced tensor are new objects: build the
    optimizer afterwards.

    Args:
        uneven: some ranks may hold one expert more than others (serving).

    Returns:
        parameter name → where this rank's tensor lies in the global one, for every parameter and persistent buffer.

    Raises:
        ConfigError: experts, heads or features can not be divided by the ranks, or the plan uses an unknown placement.
    """
    plan: Mapping[str, str] = cast(Any, model).plan() if hasattr(model, "plan") else {}
    shards, traffic = {}, Traffic()
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        shape = tuple(tensor.shape)
        placement = match(plan, name)
        shards[name] = ShardSpec(shape, (0,) * len(shape), parts=2 if placement == "gated" else 1)
        if placement == "expert" and mesh.ep_size > 1 and tensor.numel():  # symmetric codes have no zero points
            first = _keep_local_experts(model, name, mesh, uneven)
            shards[name] = ShardSpec(shape, (first,) + (0,) * (len(shape) - 1), along="edp")
    for name, module in model.named_modules():
        if hasattr(module, "experts") and hasattr(module, "dispatcher") and mesh.ep_size > 1:
            total = next(s.global_shape[0] for n, s in shards.items() if n.startswith(_join(name, "experts.")))
            module.experts.first = sum(shares(total, mesh.ep_size)[: mesh.ep_rank])
            module.dispatcher = AllToAllDispatcher(mesh, total, traffic)
    if mesh.size("tp") > 1:
        shards |= divide(model, plan, mesh)
    return shards


def _keep_local_experts(model: nn.Module, name: str, mesh: Mesh, uneven: bool) -> int:
    """Replace the stacked tensor [E, ...] by this rank's experts; returns the global id of the first."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    whole = getattr(owner, leaf)
    experts, ranks = whole.shape[0], mesh.ep_size
    if uneven and experts < ranks:
        rule = f"must not exceed the experts of {name} ({experts}): use {experts} or less"
        raise ConfigError(f"parallel.ep ({ranks}) {rule}")
    if not uneven and experts % ranks:
        raise ConfigError(f"parallel.ep ({ranks}) must divide the experts of {name} ({experts}): use a divisor of it")
    held = shares(experts, ranks)
    first = sum(held[: mesh.ep_rank])
    part = whole.detach()[first : first + held[mesh.ep_rank]].clone()
    if isinstance(whole, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(part, requires_grad=whole.requires_grad))
    else:
        owner.register_buffer(leaf, part)
    return first


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
