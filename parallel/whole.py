"""Matrices that ranks hold in slices, each brought together on one of them and handed back in slices.

An optimizer that needs whole matrices computes on what `gather` gives it and moves its own weights by what `own`
returns. So every matrix is computed on one rank and the work is shared out evenly; all slices of a call travel in one
all-to-all, and so do the results. A matrix that a rank holds whole stays where it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import Dimension, Mesh
from .process import naming
from .shard import ShardSpec

OVER: Mapping[str, Dimension] = {
    "alone": "stage",
    "replicas": "tp",
}  # replicas of a slice lie along … → the other slices along …
Parts = dict[nn.Parameter, Tensor]
Shape = tuple[int, ...]


class Whole:
    """Brings divided matrices together; without arguments nothing is divided.

    Stacks [E, R, C] are divided between matrices, so there is nothing to bring together.

    Args:
        parameters: name → what this rank holds.
        shards: name → where that lies in the whole parameter.
        mesh: the layout. Creation is collective.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter] | None = None,
        shards: Mapping[str, ShardSpec] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self._specs: dict[nn.Parameter, ShardSpec] = {}
        self._places: dict[nn.Parameter, list[tuple[slice, ...]]] = {}  # by rank: its slice of the matrix
        self._owner: dict[nn.Parameter, int] = {}
        if parameters is None or shards is None or mesh is None:
            return
        for name, weight in parameters.items():
            over = OVER.get(shards[name].along)
            if over is not None and weight.ndim == 2 and mesh.size(over) > 1:
                self._specs[weight], self._group = shards[name], mesh.group(over)
        if self._specs:
            self._find_places()
            self._share_out()

    def shape(self, weight: nn.Parameter) -> Shape:
        """The shape of a parameter's matrices as they are computed: of a divided one that of the whole."""
        return self._specs[weight].global_shape if weight in self._specs else tuple(weight.shape)

    def here(self, weight: nn.Parameter) -> bool:
        """Whether this rank computes a parameter's matrices."""
        return weight not in self._specs or self._owner[weight] == self._group.rank()

    def batches(self, weights: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """`weights`, those that travel together and the others one by one."""
        travel = [weight for weight in weights if weight in self._specs]
        return [[weight] for weight in weights if weight not in self._specs] + ([travel] if travel else [])

    def gather(self, slices: Parts) -> Parts:
        """This rank's slices → the whole matrices that it computes. Collective when one of them is divided.

        Slices have one dtype, and ranks that hold a matrix together give the same ones in the same order.
        """
        travel, mine = self._travel(slices)
        whole = {weight: matrices for weight, matrices in slices.items() if weight not in self._specs}
        if any(travel):
            shapes = [[_shape(self._places[weight][rank]) for weight in mine] for rank in range(len(travel))]
            arrived = self._exchange([[slices[weight] for weight in some] for some in travel], shapes, slices)
            for number, weight in enumerate(mine):
                whole[weight] = slices[weight].new_empty(self.shape(weight))
                block = whole[weight].view(self._specs[weight].block.global_shape)
                for place, parts in zip(self._places[weight], arrived, strict=True):
                    block[place] = parts[number]
        return whole

    def own(self, whole: Parts, slices: Parts) -> Parts:
        """Whole matrices that this rank computed → its slices of those that all ranks did. Collective likewise.

        Args:
            whole: weight → what was made of each matrix that `gather` returned.
            slices: what was given to `gather`.
        """
        travel, mine = self._travel(slices)
        ours = {weight: matrices for weight, matrices in whole.items() if weight not in self._specs}
        if any(travel):
            blocks = {weight: whole[weight].reshape(self._specs[weight].block.global_shape) for weight in mine}
            parts = [[blocks[weight][self._places[weight][rank]] for weight in mine] for rank in range(len(travel))]
            shapes = [[tuple(slices[weight].shape) for weight in some] for some in travel]
            arrived = self._exchange(parts, shapes, slices)
            for some, values in zip(travel, arrived, strict=True):
                ours.update(zip(some, values, strict=True))
        return ours

    def _travel(self, slices: Parts) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        """By rank, the divided matrices among `slices` that it computes; and those of this rank."""
        if not self._specs:
            return [], []
        divided = [weight for weight in slices if weight in self._specs]
        by_rank = [[w for w in divided if self._owner[w] == rank] for rank in range(self._group.size())]
        return by_rank, by_rank[self._group.rank()]

    def _exchange(
        self, leaving: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Shape]], slices: Parts
    ) -> list[list[Tensor]]:
        """Send every rank its tensors; those of these shapes arrive. All have the dtype of `slices`."""
        flat = [tensor.reshape(-1) for some in leaving for tensor in some]
        out = torch.cat([next(iter(slices.values())).new_empty(0), *flat])
        received = [sum(map(math.prod, some)) for some in shapes]
        sent = [sum(tensor.numel() for tensor in some) for some in leaving]
        arriving = out.new_empty(sum(received))
        with naming("all-to-all of matrices"):
            dist.all_to_all_single(arriving, out, received, sent, group=self._group)
        parts = iter(arriving.split([math.prod(shape) for some in shapes for shape in some]))
        return [[next(parts).view(shape) for shape in some] for some in shapes]

    def _find_places(self) -> None:
        """Tell each other which slice of each matrix a rank holds."""
        held = [[*spec.offset, *weight.shape] for weight, spec in self._specs.items()]
        mine = torch.tensor(held, device=next(iter(self._specs)).device)
        by_rank = [torch.empty_like(mine) for _ in range(self._group.size())]
        with naming("exchange of the matrices' slices"):
            dist.all_gather(by_rank, mine, group=self._group)
        for (weight, spec), theirs in zip(self._specs.items(), torch.stack(by_rank, 1).tolist(), strict=True):
            self._places[weight] = [replace(spec, offset=tuple(at[:2])).place(tuple(at[2:])) for at in theirs]

    def _share_out(self) -> None:
        """Give each matrix, the largest first, to the rank that has the least to compute so far."""
        load = [0] * self._group.size()
        for weight, spec in sorted(self._specs.items(), key=lambda item: -math.prod(item[1].global_shape)):
            rank = load.index(min(load))
            self._owner[weight] = rank
            load[rank] += math.prod(spec.global_shape)


def _shape(place: tuple[slice, ...]) -> Shape:
    return tuple(part.stop - part.start for part in place)
