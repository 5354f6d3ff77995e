"""In which parts the rows of a layer travel, and along which way: arithmetic on the counts that all ranks know.

A chunk is a share of every rank's tokens. When some rank would hold more than `limit` rows, each chunk travels in
rounds: every pair of ranks cuts what it exchanges into the same number of slices, as few as keep every rank within the
limit. All ranks come to the same parts, because all compute them from the same counts.

P ranks, C chunks, E experts of the layer, L experts of one rank, N rows that this rank sends, M rows it receives.
Counts are int64 on the CPU; "PPL" is (source rank, destination rank, expert of the destination).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .travel import Leg, Order


@dataclass(frozen=True)
class Groups:
    """The ranks that hold the experts of a layer together, in the order in which they hold them.

    Attributes:
        ep: all of them.
        near: those of this rank's node, when rows travel within nodes first; consecutive in `ep`.
        far: those that hold this rank's place in every node.
    """

    ep: dist.ProcessGroup
    near: dist.ProcessGroup | None = None
    far: dist.ProcessGroup | None = None


def shares(num_experts: int, ranks: int) -> list[int]:
    """How many experts each rank holds, neighbours after neighbours: the first ranks one more where they do not divide.

    Training has them divide (`ParallelConfig.resolve`); serving does not ask for it.
    """
    return [num_experts // ranks + (rank < num_experts % ranks) for rank in range(ranks)]


def by_rank(counts_PCE: Tensor) -> Tensor:
    """counts_PCE with as many columns for every rank's experts: a rank that holds one less has a last one of zeros."""
    ranks, _, experts = counts_PCE.shape
    if experts % ranks == 0:
        return counts_PCE
    parts = counts_PCE.split(shares(experts, ranks), 2)
    return torch.cat([F.pad(part, (0, parts[0].shape[2] - part.shape[2])) for part in parts], 2)


def crowded(counts_PCE: Tensor, limit: int | None) -> bool:
    """Whether some rank would receive more than `limit` rows, of all chunks together."""
    ranks = len(counts_PCE)
    return limit is not None and int(counts_PCE.sum((0, 1)).view(ranks, -1).sum(1).max()) > limit


def cut(counts_PCE: Tensor, limit: int | None) -> list[list[Tensor]]:
    """The rounds of each chunk, as few as there can be: counts_PPL of the rows that travel in each.

    Args:
        counts_PCE: rows of each source rank's chunk for each expert, as many columns for every rank (`by_rank`).
        limit: rows that a rank receives in a round, at least P; None = all.
    """
    ranks, chunks, _ = counts_PCE.shape
    chunks_CPPL = counts_PCE.view(ranks, chunks, ranks, -1).transpose(0, 1)
    return [[counts_PPL] if limit is None else _rounds(counts_PPL, limit) for counts_PPL in chunks_CPPL]


def _rounds(counts_PPL: Tensor, limit: int) -> list[Tensor]:
    pairs_PP = counts_PPL.sum(2)
    count = max(-(-int(pairs_PP.sum(0).max()) // limit), 1)
    while int((-(-pairs_PP // count)).sum(0).max()) > limit:  # a slice is rounded up
        count += 1
    taken = [_first(pairs_PP * i // count, counts_PPL) for i in range(count + 1)]
    return [after - before for before, after in pairwise(taken)]


def _first(rows_PP: Tensor, counts_PPL: Tensor) -> Tensor:
    """How the first so many rows of each pair, sorted by expert, are divided among the experts."""
    ends_PPL = counts_PPL.cumsum(2)
    return ends_PPL.minimum(rows_PP[:, :, None]) - (ends_PPL - counts_PPL).minimum(rows_PP[:, :, None])


def regroup(rounds: Sequence[Sequence[Tensor]], rank: int) -> Tensor:
    """order_N: rows sorted by (chunk, destination, expert) → by (chunk, round, destination, expert)."""
    part, numbers = 0, []
    for counts in rounds:
        sizes = torch.stack([counts_PPL[rank].sum(1) for counts_PPL in counts], 1)  # by destination and round
        names = torch.arange(part, part + len(counts)).repeat(len(sizes))
        numbers.append(names.repeat_interleave(sizes.flatten()))
        part += len(counts)
    return torch.cat(numbers).argsort(stable=True)


def legs(counts_PPL: Tensor, groups: Groups, device: torch.device) -> list[Leg]:
    """The way of one part from this rank's rows, sorted by destination and expert, to rows sorted by expert and source.

    In one step, or first within the node to the rank that holds the destination's place there, then between nodes:
    each message between nodes then has the rows of a whole node. Either way rows arrive sorted by source and expert.
    """
    me = dist.get_rank(groups.ep)
    arrange = transposed(counts_PPL[:, me], device)
    pairs_PP = counts_PPL.sum(2)
    if groups.near is None or groups.far is None:
        return [Leg(groups.ep, pairs_PP[me].tolist(), pairs_PP[:, me].tolist(), after=arrange)]
    near, far = groups.near.size(), groups.far.size()
    node, place = divmod(me, near)
    pairs = pairs_PP.view(far, near, far, near)  # source node and place, destination node and place
    mine, held, coming = pairs[node, place], pairs[node, :, :, place], pairs[:, :, node, place]
    within = Leg(groups.near, mine.sum(0).tolist(), held.sum(1).tolist(), before=transposed(mine, device))
    between = Leg(
        groups.far, held.sum(0).tolist(), coming.sum(1).tolist(), before=transposed(held, device), after=arrange
    )
    return [within, between]


def transposed(counts_AB: Tensor, device: torch.device) -> Order | None:
    """From rows sorted by (a, b) to rows sorted by (b, a), of which there are counts_AB[a, b]; None = as they are."""
    if 1 in counts_AB.shape:
        return None
    total, counts_BA = int(counts_AB.sum()), counts_AB.T.flatten()
    first_BA = (counts_AB.flatten().cumsum(0).view_as(counts_AB) - counts_AB).T.flatten()
    shift_BA = first_BA - (counts_BA.cumsum(0) - counts_BA)
    here = torch.stack([shift_BA, counts_BA]).to(device)
    rows_M = torch.arange(total, device=device)
    new_M = here[0].repeat_interleave(here[1], output_size=total) + rows_M
    old_M = torch.empty_like(new_M)
    old_M[new_M] = rows_M
    return new_M, old_M
