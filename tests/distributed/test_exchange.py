"""How rows travel to experts changes when and where numbers are computed, not the numbers: chunks, rounds, nodes."""

import dataclasses
import functools

import pytest
import torch

from turnout.tests.distributed.test_layouts import assert_same_training, distance
from turnout.tests.distributed.tiny_training import ROWS, Case, train
from turnout.tests.helpers.ranks import run_ranks

WAYS = {
    "chunks": {"chunks": 2},
    "rounds": {"exchange_rows": 12},
    "chunks in rounds, all recomputed": {"chunks": 2, "exchange_rows": 12, "recompute": "full"},
    "chunks, experts recomputed": {"chunks": 3, "recompute": "selective"},
    "rounds, experts recomputed": {"exchange_rows": 12, "recompute": "selective"},
}
THROUGH_NODES = {
    "nodes": {"node": 2},
    "chunks through nodes": {"node": 2, "chunks": 3},
    "rounds through nodes": {"node": 2, "exchange_rows": 12, "recompute": "full"},
}


@functools.cache
def one_rank(case: Case) -> list[dict]:
    return [train(case)]


def spread(case: Case, world: int, recompute: str = "none", **sizes) -> tuple[list[dict], list[dict]]:
    """What `world` ranks return whose rows travel as `sizes` say, and what one rank does."""
    alone = dataclasses.replace(case, split=None)
    spread = dataclasses.replace(case, ep=world, recompute=recompute, sizes=tuple(sizes.items()))
    return run_ranks(train, world, spread), one_rank(alone)


def check(case: Case, world: int, way: dict) -> None:
    assert_same_training(*spread(case, world, **way), 1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_compute_what_one_rank_does(way):
    check(Case(router="gshard", capacity_factor=0.5), 2, WAYS[way])


@pytest.mark.parametrize("way", THROUGH_NODES)
def test_four_ranks_in_two_nodes_compute_what_one_rank_does(way):
    check(Case(router="gshard", split=(3, 0, 1, 4)), 4, THROUGH_NODES[way])


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS | THROUGH_NODES)
@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("situation", [{}, {"hot": True, "capacity_factor": None}, {"split": (ROWS - 3, 0, 3, 0)}])
def test_four_ranks_compute_what_one_rank_does(situation, router, way):
    check(Case(router=router, **situation), 4, (WAYS | THROUGH_NODES)[way])


@pytest.mark.parametrize("way", [{"chunks": 2}, {"exchange_rows": 12}], ids=str)
def test_fifty_steps_with_unequal_and_no_tokens_neither_hang_nor_drift(way):
    case = Case(router="switch", optimizer="sgd", split=(5, 0, 3, 0), steps=50)
    views, expected = spread(case, 4, **way)
    assert distance(torch.tensor(views[0]["curve"]), torch.tensor(expected[0]["curve"])) <= 1e-9
    assert_same_training(views, expected, 1e-9)
