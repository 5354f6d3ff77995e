"""Tensor parallelism: the ranks along "tp" compute a layer together, each with its heads or hidden units.

    x of a rank's own tokens  →  x of all tokens      all-gather; its gradient comes back by a sum
    W_in: output features divided                     each rank: its part of the hidden units, for all tokens
    W_out: input features divided                     each rank: its term of the outputs of all tokens
    terms of all tokens  →  y of a rank's own tokens  sum; its gradient comes back by an all-gather

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
    rank, size, group, shards = mesh.place["tp"], mesh.size("tp"), mesh.group("tp"), {}
    for path, layer in _layers(model, plan):
        whole = layer.keep_part(rank, size) if isinstance(layer, Divisible) else ()
        for leaf, matrix in layer.named_children():
            name = f"{path}.{leaf}.weight"
            if leaf not in whole and (placement := match(plan, name)) in DIVIDED:
                shards[name] = _keep(cast(nn.Linear, matrix), name, placement, rank, size)
        layer.register_forward_pre_hook(lambda _, args: (gather(_autocast(args[0]), group, TOKENS), *args[1:]))
        layer.register_forward_hook(lambda _, args, y_AD: scatter_sum(y_AD, group, OUTPUTS))
    return shards


def _autocast(x: Tensor) -> Tensor:
    """In the dtype that the layer's products would give it: it travels and is kept in that."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _layers(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every layer that owns divided matrices."""
    names = (name for name, _ in model.named_parameters() if match(plan, name) in DIVIDED)
    for path in dict.fromkeys(name.rsplit(".", 2)[0] for name in names):
        yield path, model.get_submodule(path)


def _keep(matrix: nn.Linear, name: str, placement: Placement, rank: int, size: int) -> ShardSpec:
    """Replace a matrix [out, in] by this rank's part of it; returns the part's place."""
    whole, axis = matrix.weight, 1 if placement == "row" else 0
    parts, shape, local = 2 if placement == "gated" else 1, tuple(whole.shape), list(whole.shape)
    if shape[axis] % (parts * size):
        features = "input" if axis else "gated output" if parts > 1 else "output"
        raise ConfigError(
            f"parallel.tp ({size}) must divide the {features} features of {name} ({shape[axis] // parts}): "
            "use a divisor of it"
        )
    local[axis] //= size
    offset = [0, 0]
    offset[axis] = rank * local[axis] // parts
    spec = ShardSpec(shape, tuple(offset), along="replicas", parts=parts)
    part = spec.take(whole.detach(), tuple(local)).clone()
    matrix.weight = nn.Parameter(part, requires_grad=whole.requires_grad)
    matrix.out_features, matrix.in_features = local
    return spec
