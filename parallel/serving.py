"""What the ranks that serve one model tell each other: rank 0 says what is computed, all compute, rank 0 gets the rows.

    link = Link(mesh)                      # collective
    link.order(kind, parts)                # on rank 0: a list of tensors for every part
    kind, tensors = link.receive(part)     # on the others, which wait for as long as it takes
    link.collect(rows_RX, counts)          # on all: rank 0 gets every rank's rows

An order is a header (kind, numbers) and so many int64: how many belong to each part, then of each tensor its dtype, its
shape and its values. It goes to all ranks over the host's network, whatever device they compute on.

R rows of X numbers.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from . import process
from .mesh import Mesh

DTYPES = (torch.int64, torch.int32, torch.bool)
IDLE = timedelta(days=3650)  # nothing may happen for long; a lost rank is noticed otherwise (`process.watch`)


class Link:
    """This rank's end of what connects them. One thread uses it; every method is collective.

    Args:
        mesh: the ranks; a part of an order belongs to the `dp` rank of its number.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        with process.naming("creation of the group for orders"):
            self._group = dist.new_group(backend="gloo", timeout=IDLE)

    def order(self, kind: int, parts: Sequence[Sequence[Tensor]] = ()) -> None:
        """Tell all ranks what to do (rank 0).

        Args:
            kind: what.
            parts: tensors of integers for each part, on the host.
        """
        packed = [[number for tensor in part for number in _pack(tensor)] for part in parts]
        values = [len(packed), *map(len, packed), *(number for part in packed for number in part)]
        with process.naming("an order of rank 0"):
            dist.broadcast(torch.tensor([kind, len(values)]), src=0, group=self._group)
            dist.broadcast(torch.tensor(values), src=0, group=self._group)

    def receive(self, part: int) -> tuple[int, list[Tensor]]:
        """What rank 0 orders, and the tensors of one part; none when the order has none (the other ranks)."""
        with process.naming("waiting for an order of rank 0"):
            header = torch.empty(2, dtype=torch.int64)
            dist.broadcast(header, src=0, group=self._group)
            kind, size = header.tolist()
            values = torch.empty(size, dtype=torch.int64)
            dist.broadcast(values, src=0, group=self._group)
        sizes = values[1 : 1 + int(values[0])].tolist()
        if not sizes:
            return kind, []
        first = 1 + len(sizes) + sum(sizes[:part])
        return kind, list(_unpack(values[first : first + sizes[part]]))

    def collect(self, rows_RX: Tensor, counts: Sequence[int]) -> Tensor:
        """All ranks' rows on rank 0, rank after rank; nothing elsewhere.

        Args:
            rows_RX: this rank's, on its device; the same dtype and X everywhere.
            counts: R of every rank; only rank 0 needs to know them.
        """
        mine, world = len(rows_RX), self.mesh.world
        arriving = list(counts) if self.mesh.rank == 0 else [0] * world
        found = rows_RX.new_empty(sum(arriving), *rows_RX.shape[1:])
        with process.naming("collection of rank 0's rows"):
            dist.all_to_all_single(found, rows_RX.contiguous(), arriving, [mine, *[0] * (world - 1)])
        return found

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return min(process.gather_json(value))


def _pack(tensor: Tensor) -> list[int]:
    return [DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *tensor.flatten().tolist()]


def _unpack(values: Tensor) -> Iterator[Tensor]:
    at = 0
    while at < len(values):
        dtype, dim = values[at : at + 2].tolist()
        shape = values[at + 2 : at + 2 + dim].tolist()
        at += 2 + dim
        size = 1
        for length in shape:
            size *= length
        yield values[at : at + size].to(DTYPES[dtype]).view(shape)
        at += size
