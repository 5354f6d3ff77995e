"""Tensor parallelism: the ranks along "tp" compute a layer together, each with its heads or hidden units.

    x of a rank's own tokens  →  x of all tokens      all-gather; its gradient comes back by a sum
    W_in: output features divided                     each rank: its part of the hidden units, for all tokens
    W_out: input features divided                     each rank: its term of the outputs of all tokens
    terms of all tokens  →  y of a rank's own tokens  sum; its gradient comes back by an all-gather

Biases of output features, and a layer's own vectors, are divided with them; W_out's bias is whole, and the first rank's
term has it.

(Shoeybi et al. 1909.08053 §3, with tokens divided between layers as in Korthikanti et al. 2205.05198 §4.2.2.) Norms,
residuals, routers, experts, head and loss see a rank's own tokens only; what they train is replicated and its gradient
summed as over data-parallel ranks.

T tokens held here, A tokens of all ranks along "tp", D width.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from .. import ConfigError
from ..kernels import linear
from .gather import gather, scatter_sum
from .mesh import Mesh
from .plan import Placement, match
from .shard import ShardSpec

DIVIDED = ("column", "gated", "row")
TOKENS, OUTPUTS = "a divided layer's tokens", "a divided layer's outputs"


@runtime_checkable
class Divisible(Protocol):
    """A layer that must know which part of it this rank computes, beyond having smaller matrices."""

    def keep_part(self, rank: int, size: int) -> Collection[str]:
        """Become part `rank` of `size`; returns which of its matrices' modules stay whole nevertheless.

        Raises:
            ConfigError: it can not be divided so.
        """
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
        for leaf, matrix in layer.named_children():
            if leaf not in whole and (placement := match(plan, f"{path}.{leaf}.weight")) in DIVIDED:
                shards |= _divide(cast(nn.Linear, matrix), f"{path}.{leaf}", placement, rank, size)
        for leaf, _ in list(layer.named_parameters(recurse=False)):
            if (placement := match(plan, f"{path}.{leaf}")) in DIVIDED:
                shards[f"{path}.{leaf}"] = _keep(layer, leaf, f"{path}.{leaf}", placement, rank, size)
        layer.register_forward_pre_hook(lambda _, args: (gather(_autocast(args[0]), group, TOKENS), *args[1:]))
        layer.register_forward_hook(lambda _, args, y_AD: scatter_sum(y_AD, group, OUTPUTS))
    return shards


def _autocast(x: Tensor) -> Tensor:
    """In the dtype that the layer's products would give it: it travels and is kept in that."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _layers(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every layer that owns divided matrices."""
    names = (name for name, weight in model.named_parameters() if weight.ndim > 1 and match(plan, name) in DIVIDED)
    for path in dict.fromkeys(name.rsplit(".", 2)[0] for name in names):
        yield path, model.get_submodule(path)


def _divide(matrix: nn.Linear, path: str, placement: Placement, rank: int, size: int) -> dict[str, ShardSpec]:
    """Keep this rank's part of a matrix and its bias; returns the parts' places by name."""
    found = {f"{path}.weight": _keep(matrix, "weight", f"{path}.weight", placement, rank, size)}
    if matrix.bias is not None and placement != "row":
        found[f"{path}.bias"] = _keep(matrix, "bias", f"{path}.bias", placement, rank, size)
    elif matrix.bias is not None:
        first = float(rank == 0)
        setattr(matrix, "forward", lambda x: linear(x, matrix.weight, matrix.bias * first))  # noqa: B010 (a method)
    matrix.out_features, matrix.in_features = matrix.weight.shape
    return found


def _keep(owner: nn.Module, leaf: str, name: str, placement: Placement, rank: int, size: int) -> ShardSpec:
    """Replace a parameter [out, in] or [out] of `owner` by this rank's part of it; returns the part's place."""
    whole, axis = cast(nn.Parameter, getattr(owner, leaf)), 1 if placement == "row" else 0
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
    setattr(owner, leaf, nn.Parameter(part, requires_grad=whole.requires_grad))
    return spec
