"""However uneven the load, a rank holds few rows at once: how rounds are cut, and what they cost in memory.

P ranks, C chunks, E experts, L experts of one rank, R rows that a rank may hold, D width, F hidden width.
"""

import gc

import pytest
import torch

from turnout.moe.config import MoEConfig
from turnout.moe.layers.experts import Experts
from turnout.parallel import process
from turnout.parallel.config import ParallelConfig
from turnout.parallel.dispatch.all_to_all import AllToAllDispatcher
from turnout.parallel.dispatch.parts import crowded, cut, regroup, transposed
from turnout.parallel.dispatch.traffic import Traffic
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.moe.train.test_recompute import Memory

TOKENS, WIDTH, HIDDEN, LIMIT = 512, 16, 48, 64
ROW = 4 * (2 * WIDTH + 3 * HIDDEN)  # bytes of a row's input, gate, up, hidden and output in float32


def random_counts(seed: int, ranks: int, chunks: int, experts: int) -> torch.Tensor:
    """Counts of which some are zero and some are large."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 40, (ranks, chunks, experts), generator=generator)
    return counts * torch.randint(0, 4, counts.shape, generator=generator)


@pytest.mark.parametrize("limit", [4, 7, 50, 300, 100_000])
@pytest.mark.parametrize("seed", range(5))
def test_rounds_are_few_take_every_row_once_and_keep_the_limit(seed, limit):
    ranks, chunks, experts = 4, 3, 8
    counts_PCE = random_counts(seed, ranks, chunks, experts)
    rounds = cut(counts_PCE, limit)
    for chunk, parts in enumerate(rounds):
        expected_PPL = counts_PCE[:, chunk].view(ranks, ranks, -1)
        assert torch.equal(torch.stack(parts).sum(0), expected_PPL)
        received = torch.stack(parts).sum((1, 3))
        assert int(received.max()) <= limit
        assert int(torch.stack(parts).min()) >= 0
        most = int(expected_PPL.sum((0, 2)).max())
        assert len(parts) <= max(-(-most // max(limit - ranks + 1, 1)), 1)
    for rank in range(ranks):
        order_N = regroup(rounds, rank)
        owner = torch.arange(chunks * experts).repeat_interleave(counts_PCE[rank].flatten())[order_N]
        sizes = [part[rank].flatten() for parts in rounds for part in parts]
        assert sorted(order_N.tolist()) == list(range(int(counts_PCE[rank].sum())))
        for some, size in zip(owner.split([int(size.sum()) for size in sizes]), sizes, strict=True):
            assert torch.equal(some % experts, torch.arange(experts).repeat_interleave(size))


def test_a_load_within_the_limit_is_not_cut():
    counts_PCE = torch.full((2, 3, 4), 5)  # 60 rows a rank
    assert not crowded(counts_PCE, 60)
    assert not crowded(counts_PCE, None)
    assert crowded(counts_PCE, 59)
    assert [len(parts) for parts in cut(counts_PCE, None)] == [1, 1, 1]
    assert [len(parts) for parts in cut(counts_PCE, 10)] == [2, 2, 2]


def test_blocks_are_transposed_and_back():
    counts_AB = torch.tensor([[2, 0, 1], [0, 3, 1]])
    new, old = transposed(counts_AB, torch.device("cpu"))
    assert new.tolist() == [0, 1, 3, 4, 5, 2, 6]
    assert new[old].tolist() == list(range(7))
    assert transposed(counts_AB[:1], torch.device("cpu")) is None
    assert transposed(counts_AB[:, :1], torch.device("cpu")) is None


class Rows:
    """Experts that note how many rows they see at once."""

    def __init__(self, experts) -> None:
        self.experts, self.most, self.calls = experts, 0, 0

    def __call__(self, rows_ND, ends_E, key_N):
        self.most, self.calls = max(self.most, len(rows_ND)), self.calls + 1
        return self.experts(rows_ND, ends_E)


def collapsed(limit: int | None, chunks: int = 1) -> dict[str, int]:
    """Forward and backward when every token of every rank goes to the first expert: bytes at the peak, and rows."""
    mesh = build_mesh(ParallelConfig(ep=process.world(), exchange_rows=limit, chunks=chunks), "cpu")
    stack = Experts(MoEConfig(width=WIDTH, expert_width=HIDDEN, num_experts=1))
    for parameter in stack.parameters():
        parameter.grad = torch.zeros_like(parameter)
    experts, dispatcher = Rows(stack), AllToAllDispatcher(mesh, mesh.ep_size, Traffic())
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    ids_T1, weights_T1 = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1, requires_grad=True)
    gc.collect()
    with Memory() as measured:
        sent = dispatcher.dispatch(x_TD, ids_T1, torch.ones_like(ids_T1, dtype=torch.bool), mesh.ep_size)
        y_TD = dispatcher.combine(sent, experts, weights_T1)
        del sent
        y_TD.square().sum().backward()
    return {"peak": measured.peak, "rows": experts.most, "calls": experts.calls}


@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_the_peak_of_a_collapsed_layer_is_bound_by_the_limit(chunks):
    peaks = {}
    for world in (2, 4):
        (free, idle, *_), (bound, *_) = (run_ranks(collapsed, world, limit, chunks) for limit in (None, LIMIT))
        assert free["rows"] * chunks == world * TOKENS
        assert bound["rows"] == LIMIT
        assert bound["calls"] == 2 * world * TOKENS // LIMIT, "each round once forward and once backward"
        assert bound["peak"] - idle["peak"] <= 2 * LIMIT * ROW, "beside what its own tokens cost a rank"
        peaks[world] = free["peak"], bound["peak"]
    assert peaks[4][0] > 1.8 * peaks[2][0]
    assert peaks[4][1] <= 1.01 * peaks[2][1] < 0.3 * peaks[2][0]
