"""The ranks, arranged twice: pp x dp x cp x tp for everything dense, and each stage again as edp x ep for the experts.

rank   0 1 2 3      world 4, tp 2, ep 4: (0, 1) and (2, 3) divide heads and hidden units and read the same rows;
tp     0 1 0 1      all four hold a quarter of the experts each.
dp     0 0 1 1
ep     0 1 2 3
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import process
from .config import Exchange, Layout, ParallelConfig

Dimension = Literal["pp", "dp", "cp", "tp", "ep", "edp", "near", "far", "stage", "replicas", "row", "ends", "alone"]

# A group runs along the named dimensions: ranks that differ in nothing else belong together.
ALONG: dict[Dimension, tuple[str, ...]] = {
    "pp": ("pp",),  # hold the model together
    "dp": ("dp",),  # read different rows; nothing travels between them alone
    "cp": ("cp",),  # hold the tokens of the same rows, for one part of the heads
    "tp": ("tp",),  # hold the heads and hidden units of a layer together
    "stage": ("dp", "cp", "tp"),  # hold replicas of what is not divided
    "replicas": ("dp", "cp"),  # hold replicas of what tensor parallelism divides
    "row": ("cp", "tp"),  # hold the tokens of the same rows
    "ep": ("ep",),  # hold the experts together
    "edp": ("edp",),  # hold replicas of the same experts
    "ends": ("pp",),  # first and last stage: hold replicas of a tied embedding; those between are alone
    "alone": (),  # hold what no other rank does
}
DENSE = ("pp", "dp", "cp", "tp")
EXPERT = ("pp", "edp", "ep")


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands.

    Attributes:
        rank, world: this process among all.
        layout: how many ranks there are along each dimension.
        place: this rank's number along each dimension.
        device: where its tensors live.
        groups: the ranks along each dimension of more than one rank; with `parallel.node` also those of `ep` that are
            "near", in the same node, and "far", at the same place of every node.
        exchange: how rows travel to experts.
    """

    rank: int
    world: int
    layout: Layout
    place: dict[str, int]
    device: torch.device
    groups: dict[Dimension, dist.ProcessGroup] = field(default_factory=dict)
    exchange: Exchange = field(default_factory=Exchange)

    @staticmethod
    def alone(device: torch.device) -> "Mesh":
        """One rank, whatever process group it may stand in."""
        layout = Layout(dp=1, ep=1, edp=1)
        return Mesh(rank=0, world=1, layout=layout, place=layout.place(0), device=device)

    def group(self, dim: Dimension) -> dist.ProcessGroup:
        """The ranks along one dimension (`ALONG`); a dimension of one rank has no group."""
        assert dim in self.groups, f"{dim} is one rank, which is no group"
        return self.groups[dim]

    def size(self, dim: Dimension) -> int:
        """How many ranks a group along `dim` has."""
        return self.groups[dim].size() if dim in self.groups else 1

    def device_mesh(self, dim: Dimension) -> DeviceMesh:
        """The ranks along `dim` as torch's libraries want them."""
        return DeviceMesh.from_group(self.group(dim), self.device.type, mesh_dim_names=(dim,))

    def sum(self, tensor: torch.Tensor, dim: Dimension) -> torch.Tensor:
        """The sum over the ranks along `dim`, as a new tensor without gradient."""
        group = self.groups.get(dim)
        return tensor if group is None else process.all_sum(tensor, f"sum over the ranks along {dim}", group)

    @property
    def dp_rank(self) -> int:
        return self.place["dp"]

    @property
    def dp_size(self) -> int:
        return self.layout.dp

    @property
    def ep_rank(self) -> int:
        return self.place["ep"]

    @property
    def ep_size(self) -> int:
        return self.layout.ep

    @property
    def edp_size(self) -> int:
        return self.layout.edp


def build_mesh(config: ParallelConfig, device_type: str | None = None, num_experts: int | None = None) -> Mesh:
    """Arrange all ranks as `config` says; collective over the world when a process group stands.

    Raises:
        ConfigError: the sizes do not fit the world or the number of experts.
        PeerError: a rank did not take part.
    """
    rank, world = process.rank(), process.world()
    layout = config.resolve(world, num_experts)
    groups: dict[Dimension, dist.ProcessGroup] = {}
    exchange = config.exchange
    with process.naming("creation of the mesh's groups"):
        for dim in ALONG:
            partition = ranks_along(layout, dim)
            if len(partition[0]) > 1 and _serves(layout, dim):
                groups[dim] = _own_group(partition, config.timeout)
        if exchange.node is not None:
            near, far = through_nodes(layout, exchange.node)
            groups["near"], groups["far"] = _own_group(near, config.timeout), _own_group(far, config.timeout)
    device, place = process.local_device(device_type), layout.place(rank)
    return Mesh(rank=rank, world=world, layout=layout, place=place, device=device, groups=groups, exchange=exchange)


def _serves(layout: Layout, dim: Dimension) -> bool:
    """Whether anything travels along `dim`: what is not divided has no replicas but those of its stage."""
    return {"dp": False, "replicas": layout.tp > 1, "edp": layout.ep > 1}.get(dim, True)


def through_nodes(layout: Layout, node: int) -> tuple[list[list[int]], list[list[int]]]:
    """All groups of `node` expert-parallel neighbours, and all groups of those at the same place of every node."""
    rows = ranks_along(layout, "ep")
    near = [row[first : first + node] for row in rows for first in range(0, len(row), node)]
    return near, [row[place::node] for row in rows for place in range(node)]


def ranks_along(layout: Layout, dim: Dimension) -> list[list[int]]:
    """All groups along `dim`, each with its ranks in order."""
    apart = [name for name in (EXPERT if dim in ("ep", "edp") else DENSE) if name not in ALONG[dim]]

    def elsewhere(rank: int) -> tuple[int, ...]:
        place = layout.place(rank)
        between = place["pp"] if dim == "ends" and place["pp"] != layout.pp - 1 else 0
        return between, *(place[name] for name in apart)

    ranks = sorted(range(layout.world), key=lambda rank: (elsewhere(rank), rank))
    return [list(group) for _, group in groupby(ranks, key=elsewhere)]


def _own_group(partition: Sequence[Sequence[int]], timeout: float) -> dist.ProcessGroup:
    """One group for each list of ranks; returns ours. (`init_device_mesh` would take torch's 30-minute default.)"""
    mine = None
    for ranks in partition:
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
        if process.rank() in ranks:
            mine = group
    assert mine is not None
    return mine
