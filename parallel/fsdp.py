"""FSDP2 (`torch.distributed.fsdp.fully_shard`): parameters, gradients and states divided over their replicas.

    what                     divided over   gathered in              for
    a block's matrices       stage          the forward's dtype      its forward and its backward pass
    experts that are spread  edp            the forward's dtype      their layer's forward and backward pass
    embedding, head          stage          the parameters' dtype    the whole forward and backward pass
    vectors, routers         nothing: they are small, and what autocast leaves in float32 stays whole and exact

Autocast casts the same matrices for its products, so a step computes the same numbers with and without.

Every matrix or stack is cut along its first dimension into `ceil(rows / ranks)` rows a rank, the last ranks may get
none; one of several parts (`ShardSpec.parts`) is cut along its columns, which the ranks must divide. Every reduction
is a plain sum. Gradients are reduced in every backward pass: to keep them whole until the last micro-batch would take
the memory that FSDP is there to save.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .. import ConfigError
from .mesh import Dimension, Mesh
from .process import naming
from .shard import ShardSpec

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def divide(
    model: nn.Module,
    units: Iterable[nn.Module],
    mesh: Mesh,
    shards: Mapping[str, ShardSpec],
    keep: Callable[[str], bool],
    dtype: torch.dtype | None = None,
) -> dict[str, ShardSpec]:
    """Divide the parameters of `model` over `mesh`, in place; they become DTensors. Collective.

    Args:
        model: parallelized.
        units: its blocks, each gathered as one.
        mesh: the layout.
        shards: what `parallelize` returned.
        keep: parameter name → whether it stays whole; vectors always do.
        dtype: in which blocks are gathered; None = as the parameters are.

    Returns:
        `shards` with the places of the divided parameters.

    Raises:
        ConfigError: torch is too old.
    """
    if mesh.size("stage") == 1:
        return dict(shards)
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # takes a second, and is rare
    from torch.distributed.tensor import Shard

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"parallel.fsdp (true) needs torch 2.13, this is {torch.__version__}: install it, or use false"
        )
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    parameters = dict(model.named_parameters())
    over: dict[str, Dimension] = {
        name: "edp" if shards[name].along == "edp" else "stage"
        for name, weight in parameters.items()
        if weight.ndim > 1 and not keep(name)
    }
    over = {name: dim for name, dim in over.items() if mesh.size(dim) > 1}
    columns = {parameters[name] for name in over if shards[name].parts > 1}
    options: dict[str, Any] = {"shard_placement_fn": lambda weight: Shard(1) if weight in columns else None}
    meshes = {dim: mesh.device_mesh(dim) for dim in set(over.values())}
    options["ignored_params"] = {weight for name, weight in parameters.items() if name not in over}
    with naming("start of FSDP"):
        for path in sorted({name.rpartition(".")[0] for name, dim in over.items() if dim == "edp"}):
            fully_shard(model.get_submodule(path), mesh=meshes["edp"], mp_policy=policy, **options)
        for unit in units:
            fully_shard(unit, mesh=meshes["stage"], mp_policy=policy, **options)
        fully_shard(model, mesh=meshes["stage"], **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True)  # a rank without tokens may leave parameters untouched
    cast(Any, model).register_forward_hook(_reshard)
    return {**shards, **{name: _slice(shards[name], parameters[name], mesh, dim) for name, dim in over.items()}}


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What this rank holds of every parameter, as plain tensors that share its memory; the same objects every time.

    Of a model that is not divided these are its parameters. Optimizers are built over them.
    """
    return {name: _own(weight) for name, weight in model.named_parameters()}


def own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its slice of a DTensor."""
    return cast(Any, tensor.detach()).to_local() if _divided(tensor) else tensor


def hand_over_gradients(model: nn.Module) -> None:
    """Move the divided parameters' gradients to the tensors of `own_parameters`."""
    for weight in model.parameters():
        if _divided(weight):
            _own(weight).grad = None if weight.grad is None else own(weight.grad)
            weight.grad = None


def _divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module is only imported when something is divided."""
    return hasattr(tensor, "to_local")


def _own(weight: Any) -> nn.Parameter:
    if _divided(weight) and not hasattr(weight, "own"):
        setattr(weight, "own", nn.Parameter(own(weight), requires_grad=weight.requires_grad))  # noqa: B010 (not torch's)
    return getattr(weight, "own", weight)


def _slice(spec: ShardSpec, weight: Tensor, mesh: Mesh, dim: Dimension) -> ShardSpec:
    """Where this rank's share lies of a `weight` that all ranks along `dim` held at `spec`."""
    group, cut, offset = mesh.group(dim), int(spec.parts > 1), list(spec.offset)
    size = weight.shape[cut]
    offset[cut] += min(group.rank() * -(-size // group.size()), size)
    return replace(spec, offset=tuple(offset), along="alone")


def _reshard(model: "FSDPModule", *_: Any) -> None:
    """Without a backward pass nothing else would divide embedding and head again."""
    if not torch.is_grad_enabled():
        model.reshard()
