"""The ranks, arranged twice: in a line for the dense parameters, in edp x ep for the experts.

rank   0 1 2 3      world 4, ep 2: the neighbours (0, 1) and (2, 3) hold all experts once each;
ep     0 1 0 1      (0, 2) and (1, 3) hold replicas of the same experts.
edp    0 0 1 1
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import process
from .config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands.

    Attributes:
        rank, world: this process among all.
        dp_rank, dp_size: its place among the data-parallel ranks (all ranks: each reads its own part of the batch).
        ep_rank, ep_size: its place among the ranks over which the experts are spread.
        edp_rank, edp_size: its place among the ranks that hold the same experts.
        device: where its tensors live.
        dense: mesh ("dp",) over all ranks; None in a world of one.
        expert: mesh ("edp", "ep") over the same ranks; None in a world of one.
    """

    rank: int
    world: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    edp_rank: int
    edp_size: int
    device: torch.device
    dense: DeviceMesh | None = None
    expert: DeviceMesh | None = None

    def group(self, dim: Literal["dp", "ep", "edp"]) -> dist.ProcessGroup:
        """The ranks along one dimension; there are none in a world of one."""
        mesh = self.dense if dim == "dp" else self.expert
        assert mesh is not None, "a world of one has no groups"
        return mesh.get_group(dim)


def build_mesh(config: ParallelConfig, device_type: str | None = None, num_experts: int | None = None) -> Mesh:
    """Arrange all ranks as `config` says; collective over the world when a process group stands.

    Raises:
        ConfigError: the sizes do not fit the world or the number of experts.
        PeerError: a rank did not take part.
    """
    rank, world = process.rank(), process.world()
    layout = config.resolve(world, num_experts)
    edp_rank, ep_rank = divmod(rank, layout.ep)
    dense, expert = None, None
    device = process.local_device(device_type)
    if world > 1:
        ranks = torch.arange(world).view(layout.edp, layout.ep)
        with process.naming("creation of the mesh's groups"):
            dp_group = _own_group([list(range(world))], config.timeout)
            ep_group = _own_group(ranks.tolist(), config.timeout)
            edp_group = _own_group(ranks.T.tolist(), config.timeout)
        names = ("edp", "ep")
        expert = DeviceMesh.from_group([edp_group, ep_group], device.type, mesh=ranks, mesh_dim_names=names)
        dense = DeviceMesh.from_group(dp_group, device.type, mesh_dim_names=("dp",))
    return Mesh(
        rank=rank, world=world, dp_rank=rank, dp_size=layout.dp, ep_rank=ep_rank, ep_size=layout.ep,
        edp_rank=edp_rank, edp_size=layout.edp, device=device, dense=dense, expert=expert,
    )  # fmt: skip


def _own_group(partition: list[list[int]], timeout: float) -> dist.ProcessGroup:
    """One group for each list of ranks; returns ours. (`init_device_mesh` would take torch's 30-minute default.)"""
    mine = None
    for ranks in partition:
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
        if process.rank() in ranks:
            mine = group
    assert mine is not None
    return mine
