"""What is recomputed over ranks: the same bits, the exchanges that are promised, in the same order on every rank."""

import dataclasses

import pytest
import torch

from turnout.parallel.dispatch import all_to_all, travel
from turnout.tests.distributed.tiny_training import ROWS, Case, train
from turnout.tests.helpers.ranks import run_ranks

SITUATIONS = {
    "plain": {},
    "drops": {"capacity_factor": 0.5},
    "hot expert": {"hot": True, "capacity_factor": None},
    "rank without tokens": {"split": (ROWS, 0)},
    "accumulation": {"micro_batches": 2},
}
# The exchanges of one layer, in order: the names of its all-to-alls.
THERE = ["expert counts", "expert rows", "expert rows"]
BACK = ["expert gradients", "expert gradients"]


def train_all(case, settings):
    """`train` under each setting of `recompute`, with the names of its exchanges in order."""
    views, naming, start = {}, all_to_all.naming, travel._Flight.start
    for how in settings:
        exchanges = []

        def counts(operation, exchanges=exchanges):
            exchanges.append(operation.removeprefix("gathering of "))
            return naming(operation)

        def rows(flight, rows_ND, leg, what, exchanges=exchanges):
            exchanges.append(what)
            return start(flight, rows_ND, leg, what)

        all_to_all.naming, travel._Flight.start = counts, rows
        try:
            views[how] = train(dataclasses.replace(case, recompute=how)) | {"exchanges": exchanges}
        finally:
            all_to_all.naming, travel._Flight.start = naming, start
    return views


def assert_same(ours, theirs):
    """Bit for bit."""
    assert ours["curve"] == theirs["curve"]
    assert ours["steps"] == theirs["steps"]
    for what in ("grads", "parameters"):
        assert ours[what].keys() == theirs[what].keys()
        assert [name for name in theirs[what] if not torch.equal(ours[what][name], theirs[what][name])] == []
    for found, expected in zip(ours["parts"], theirs["parts"], strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def check(case, world):
    views = run_ranks(train_all, world, case, ("none", "selective", "full"))
    for view in views:
        for how in ("selective", "full"):
            assert_same(view[how], view["none"])
            assert view[how]["exchanges"] == views[0][how]["exchanges"]
    return views


@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_two_ranks_compute_the_same_bits(situation, router):
    check(Case(router=router, dtype=torch.float32, ep=2, **SITUATIONS[situation]), world=2)


def test_two_ranks_with_all_experts_compute_the_same_bits():
    check(Case(router="gshard", ep=1, split=(ROWS, 0), micro_batches=2), world=2)


@pytest.mark.full
@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("ep", [2, 4])
def test_four_ranks_compute_the_same_bits(router, ep):
    check(Case(router=router, ep=ep, split=(ROWS - 3, 0, 3, 0), capacity_factor=0.5), world=4)


def test_full_exchanges_again_in_the_backward_pass_and_selective_does_not():
    for view in check(Case(router="gshard", ep=2, steps=1, split=(ROWS, 0)), world=2):
        once = 2 * THERE + 2 * BACK  # of two layers
        assert view["none"]["exchanges"] == view["selective"]["exchanges"] == once
        assert view["full"]["exchanges"] == 2 * THERE + 2 * (THERE + BACK)


@pytest.mark.full
def test_deepspeed_recomputes_the_same_bits():
    case = Case(router="gshard", dtype=torch.float32, ep=2, engine="deepspeed", micro_batches=2, split=(ROWS, 0))
    env = {"DS_ACCELERATOR": "cpu"}
    for view in run_ranks(train_all, 2, case, ("none", "selective", "full"), fresh=True, timeout=200, env=env):
        assert_same(view["selective"], view["none"])
        assert_same(view["full"], view["none"])
