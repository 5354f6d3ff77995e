"""The promise of every layout: dp, ep and accumulation change where numbers are computed, not the numbers.

Per tensor ‖a − b‖ / ‖b‖ against one rank: at most 1e-9 in float64 (AdamW) and 1e-5 in float32 (SGD, on data whose
router margins exceed 1e-4), for losses, balance losses, every gradient, the clip coefficient and the parameters after
3 steps.
"""

import dataclasses
import functools

import pytest
import torch

from turnout.tests.distributed.tiny_training import EXPERTS, HOT, ROWS, Case, gathered, summed, train, whole
from turnout.tests.helpers.ranks import run_ranks

BOUND = {torch.float64: 1e-9, torch.float32: 1e-5}
PRECISIONS = [
    pytest.param(torch.float64, "adamw", id="float64-adamw"),
    pytest.param(torch.float32, "sgd", id="float32-sgd"),
]
SITUATIONS = {
    "plain": {},
    "drops": {"capacity_factor": 0.5},
    "hot expert": {"hot": True, "capacity_factor": None},
    "rank without tokens": {"split": (ROWS, 0)},
    "accumulation": {"micro_batches": 2},
}


def distance(a: torch.Tensor | float, b: torch.Tensor | float) -> float:
    """‖a − b‖ / ‖b‖; 0 when both are zero."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    gap = float((a - b).norm())
    return gap / float(b.norm()) if gap else 0.0


@functools.cache
def one_rank(case: Case) -> dict:
    return train(case)


def reference(case: Case) -> list[dict]:
    return [one_rank(dataclasses.replace(case, ep=1, split=None, micro_batches=1))]


def assert_same_training(views: list[dict], expected: list[dict], bound: float) -> None:
    records = {"index", "source index", "ids", "kept", "logits", "counts"}
    names = {key.split("/")[0] for key in expected[0]["parts"][0]} - records
    for name in names:
        assert distance(summed(views, name), summed(expected, name)) <= bound, name
    for what in ("grads", "parameters"):
        together, alone = whole(views, what), whole(expected, what)
        assert together.keys() == alone.keys()
        far = {n: d for n in alone if (d := distance(together[n], alone[n])) > bound}
        assert not far, f"{what} differ: {far}"
    for view in views:
        for ours, theirs in zip(view["steps"], expected[0]["steps"], strict=True):
            assert ours.finite
            assert distance(ours.grad_norm, theirs.grad_norm) <= bound
            assert distance(ours.clip, theirs.clip) <= bound
    assert expected[0]["steps"][0].clip < 1, "the clip must act, or its coefficient proves nothing"


def assert_situation(expected: list[dict], case: Case) -> None:
    """The reference run is what its name says, and no choice of it hangs on rounding."""
    for layer in (0, 1):
        kept, ids = gathered(expected, f"kept/{layer}"), gathered(expected, f"ids/{layer}")
        logits = gathered(expected, f"logits/{layer}").sort(descending=True).values
        gaps = (logits[:, : ids.shape[1]] - logits[:, 1 : ids.shape[1] + 1]).abs()
        gaps, ids = gaps[logits.any(1)], ids[logits.any(1)]  # padding's logits are all zero, and it goes nowhere
        assert float(gaps.min()) > 1e-4, "a near-tie in the router: choose another seed"
        first_choice = torch.bincount(ids[:, 0], minlength=EXPERTS)
        if case.hot:
            assert first_choice[HOT] == len(ids)
        else:
            assert (first_choice > 0).sum() > 1
        if case.capacity_factor == 0.5:
            assert kept.float().mean() < 0.7


def check(case: Case, world: int) -> None:
    expected = reference(case)
    assert_situation(expected, case)
    views = run_ranks(train, world, case)
    for name in ("ids/0", "kept/0", "ids/1", "kept/1"):
        assert torch.equal(gathered(views, name), gathered(expected, name)), f"routing differs: {name}"
    assert_same_training(views, expected, BOUND[case.dtype])


@pytest.mark.parametrize(
    ("ep", "dtype", "optimizer"),
    [
        pytest.param(2, torch.float64, "adamw", id="2-float64-adamw"),
        pytest.param(1, torch.float64, "adamw", id="1-float64-adamw"),
        pytest.param(2, torch.float32, "sgd", id="2-float32-sgd"),
        pytest.param(1, torch.float32, "sgd", id="1-float32-sgd", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_two_ranks_compute_what_one_rank_does(situation, router, dtype, optimizer, ep):
    check(Case(router=router, dtype=dtype, optimizer=optimizer, ep=ep, **SITUATIONS[situation]), world=2)


@pytest.mark.full
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "optimizer"), PRECISIONS)
@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_four_ranks_compute_what_one_rank_does(situation, router, dtype, optimizer, ep):
    changes = dict(SITUATIONS[situation])
    if "split" in changes:
        changes["split"] = (ROWS - 3, 0, 3, 0)
    check(Case(router=router, dtype=dtype, optimizer=optimizer, ep=ep, **changes), world=4)


def test_four_ranks_with_two_replicas_of_every_expert_compute_what_one_rank_does():
    check(Case(router="gshard", ep=2, split=(3, 0, 1, 4), capacity_factor=0.5), world=4)
