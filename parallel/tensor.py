"""Tensor parallelism: the ranks along "tp" compute a layer together, each with its heads or hidden units.

    x of a rank's own tokens  →  x of all tokens      all-gather; its gradient comes back by a sum
    W_in: output features divided                     each rank: its part of the hidden units, for all tokens
    W_out: input features divided                     each rank: its term of the outputs of all tokens
    terms of all tokens  →  y of a rank's own tokens  sum; its gradient comes back by an all-gather

Biases of output features, and a layer's own vectors, are divided with them; W_out's bias is whole, and the first rank's
term has it.

Of matrices in eight or four bits W_out's output features are divided, too: the scales of a row of it, and of a row that
meets it, are then those of one rank, and so is every product.

    its hidden units  →  all hidden units          all-gather
    W_out: output features divided                 each rank: its part of the outputs, for all tokens
    its outputs of all tokens  →  all outputs of a rank's own tokens      all-to-all

(Shoeybi et al. 1909.08053 §3, with tokens divided between layers as in Korthikanti et al. 2205.05198 §4.2.2.) Norms,
residuals, routers, experts, head and loss see a rank's own tokens only; what they train is replicated and its gradient
summed as over data-parallel ranks.

T tokens held here, A tokens of all ranks along "tp", D width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ConfigError
from ..kernels import QuantizedWeight, linear
from .gather import gather, gather_features, scatter_sum, scatter_tokens
from .mesh import Mesh
from .plan import Placement, match
from .shard import ShardSpec

Exchange = Callable[[Tensor, dist.ProcessGroup, str], Tensor]
DIVIDED = ("column", "gated", "row")
TOKENS, HIDDEN, OUTPUTS = "a divided layer's tokens", "a divided layer's hidden units", "a divided layer's outputs"


@runtime_checkable
class Divisible(Protocol):
    """A layer that must know which part of it this rank computes, beyond having smaller matrices."""

    def keep_part(self, rank: int, size: int) -> Collection[str]:
        """Become part `rank` of `size`; returns which of its matrices' modules stay whole nevertheless.

        Raises:
            ConfigError: it can not be divided so.
        """
        ...


@runtime_checkable
class Rounded(Protocol):
    """A matrix in eight or four bits: its tensors are not a `weight`, and all have the output features first."""

    @property
    def stored(self) -> QuantizedWeight:
        """The matrix."""
        ...


def divide(model: nn.Module, plan: Mapping[str, str], mesh: Mesh) -> dict[str, ShardSpec]:
    """Divide the layers of `model` that `plan` says so over the ranks along "tp", in place, also on meta.

    Returns:
        parameter name → its place, for every parameter that is now a part.

    Raises:
        ConfigError: heads or features can not be divided evenly.
    """
    rank, size, group = mesh.place["tp"], mesh.size("tp"), mesh.group("tp")
    shards: dict[str, ShardSpec] = {}
    for path, layer in _layers(model, plan):
        whole = layer.keep_part(rank, size) if isinstance(layer, Divisible) else ()
        leave: Exchange = scatter_sum
        for leaf, matrix in layer.named_children():
            if leaf in whole or (placement := match(plan, f"{path}.{leaf}.weight")) not in DIVIDED:
                continue
            if placement == "row" and isinstance(matrix, Rounded):
                matrix.register_forward_pre_hook(lambda _, args: (gather_features(args[0], group, HIDDEN),))
                placement, leave = "column", scatter_tokens
            shards |= _divide(matrix, f"{path}.{leaf}", placement, rank, size)
        for leaf, _ in list(layer.named_parameters(recurse=False)):
            if (placement := match(plan, f"{path}.{leaf}")) in DIVIDED:
                shards[f"{path}.{leaf}"] = _keep(layer, leaf, f"{path}.{leaf}", placement, rank, size)
        layer.register_forward_pre_hook(lambda _, args: (gather(_autocast(args[0]), group, TOKENS), *args[1:]))
        layer.register_forward_hook(lambda _, args, y_A, leave=leave: leave(y_A, group, OUTPUTS))
    return shards


def _autocast(x: Tensor) -> Tensor:
    """In the dtype that the layer's products would give it: it travels and is kept in that."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _layers(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every layer that owns divided matrices."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    names = (name for name, tensor in tensors if tensor.ndim > 1 and match(plan, name) in DIVIDED)
    for path in dict.fromkeys(name.rsplit(".", 2)[0] for name in names):
        yield path, model.get_submodule(path)


def _divide(matrix: nn.Module, path: str, placement: Placement, rank: int, size: int) -> dict[str, ShardSpec]:
    """Keep this rank's part of a matrix and its bias; returns the parts' places by name."""
    found = {}
    for leaf, tensor in [*matrix.named_parameters(recurse=False), *matrix.named_buffers(recurse=False)]:
        if tensor.numel() and (tensor.ndim > 1 or placement != "row"):
            found[f"{path}.{leaf}"] = _keep(matrix, leaf, f"{path}.{leaf}", placement, rank, size)
    if isinstance(matrix, nn.Linear):
        _tell(matrix, placement, rank)
    return found


def _tell(matrix: nn.Linear, placement: Placement, rank: int) -> None:
    """Let a matrix know its part's sizes, and whether its bias is this rank's to add."""
    if matrix.bias is not None and placement == "row":
        first = float(rank == 0)
        setattr(matrix, "forward", lambda x: linear(x, matrix.weight, matrix.bias * first))  # noqa: B010 (a method)
    matrix.out_features, matrix.in_features = matrix.weight.shape


def _keep(owner: nn.Module, leaf: str, name: str, placement: Placement, rank: int, size: int) -> ShardSpec:
    """Replace a tensor [out, ...] of `owner` by this rank's part of it; returns the part's place."""
    whole, axis = cast(Tensor, getattr(owner, leaf)), 1 if placement == "row" else 0
    parts, shape, local = 2 if placement == "gated" else 1, tuple(whole.shape), list(whole.shape)
    if shape[axis] % (parts * size):
        features = "input" if axis else "gated output" if parts > 1 else "output"
        raise ConfigError(
            f"parallel.tp ({size}) must divide the {features} features of {name} ({shape[axis] // parts}): "
            "use a divisor of it"
        )
    local[axis] //= size
    offset = [0] * len(shape)
    offset[axis] = rank * local[axis] // parts
    spec = ShardSpec(shape, tuple(offset), along="replicas", parts=parts)
    part = spec.take(whole.detach(), tuple(local)).clone()
    parameter = isinstance(whole, nn.Parameter)
    setattr(owner, leaf, nn.Parameter(part, requires_grad=whole.requires_grad) if parameter else part)
    return spec
