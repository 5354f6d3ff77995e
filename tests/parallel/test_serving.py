"""Orders reach every rank as they were sent, rows come back in the order of the ranks, and a lost rank is noticed."""
# ruff: noqa: N802 (M4 is the name of a rule)

import os
import signal
import threading
import time

import pytest
import torch

from turnout.parallel import ParallelConfig, build_mesh, process
from turnout.parallel.serving import Link
from turnout.tests.helpers.ranks import run_ranks

PARTS = [
    [torch.tensor([3, -1, 2**62]), torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.tensor([True, False])],
    [torch.empty(0, dtype=torch.int64), torch.empty(0, 5, dtype=torch.int32), torch.empty(0, dtype=torch.bool)],
]


def orders() -> list:
    mesh = build_mesh(ParallelConfig())
    link = Link(mesh)
    if mesh.rank == 0:
        link.order(7, PARTS)
        link.order(8)
        return [7, PARTS[0], 8, []]
    return [*link.receive(mesh.dp_rank), *link.receive(mesh.dp_rank)]


def test_M4_every_rank_gets_its_part_of_an_order_also_an_empty_one():
    for found, expected in zip(run_ranks(orders, 2), PARTS, strict=True):
        kind, tensors, last, none = found
        assert (kind, last, none) == (7, 8, [])
        for tensor, sent in zip(tensors, expected, strict=True):
            assert tensor.dtype == sent.dtype
            assert tensor.shape == sent.shape
            assert torch.equal(tensor, sent)


def rows_of(rank: int, counts: list[int]) -> torch.Tensor:
    return torch.full((counts[rank], 3), float(rank))


def collected(counts: list[int]) -> torch.Tensor:
    link = Link(build_mesh(ParallelConfig()))
    return link.collect(rows_of(process.rank(), counts), counts)


@pytest.mark.parametrize("counts", [[2, 1, 3], [0, 2, 0], [0, 0, 0]], ids=str)
def test_M4_rows_come_to_rank_0_also_from_ranks_without_any(counts):
    first, *others = run_ranks(collected, 3, counts)
    assert torch.equal(first, torch.cat([rows_of(rank, counts) for rank in range(3)]))
    assert all(len(found) == 0 for found in others)


def lose(how: int | None) -> tuple[float, str, str | None]:
    """Rank 1 sends itself a signal, or ends with words; how soon rank 0 misses it, and what it knows."""
    found, noticed = [], threading.Event()

    def lost(ranks):
        found.extend(ranks)
        noticed.set()

    process.barrier()
    process.watch(lost)
    time.sleep(1.0)
    process.barrier()
    if process.rank() == 1:
        if how is not None:
            os.kill(os.getpid(), how)
            time.sleep(60)
        process.say("the reason why")
        os._exit(1)
    start = time.monotonic()
    noticed.wait(30)
    (rank,) = found
    return time.monotonic() - start, str(rank), rank.words


@pytest.mark.parametrize(("how", "within"), [(signal.SIGKILL, 2.0), (signal.SIGSTOP, 8.0), (None, 2.0)], ids=str)
def test_G3_a_lost_rank_is_missed_without_waiting_for_a_collective(how, within):
    (seconds, who, words), lost = run_ranks(lose, 2, how, timeout=60, dies=(1,))
    assert lost is None
    assert who.startswith("rank 1 (process ")
    assert words == (None if how else "the reason why")
    assert seconds < within


def leave() -> int:
    """Everybody leaves at other times; nobody is missed by those who are told first."""
    missed = []
    process.watch(missed.extend)
    process.barrier()
    process.unwatch()
    process.barrier()
    time.sleep(1.0 if process.rank() == 0 else 0.0)
    return len(missed)


def test_G3_ranks_that_end_together_do_not_miss_each_other():
    assert run_ranks(leave, 2, fresh=True) == [0, 0]
