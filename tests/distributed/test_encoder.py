"""The promise of every layout for an encoder-decoder: the numbers of one rank, the encoder's experts spread or not."""

import dataclasses

import pytest
import torch

from turnout.tests.distributed.test_layouts import BOUND, assert_same_training, distance, reference
from turnout.tests.distributed.tiny_training import EXPERTS, ROWS, Case, gathered, train
from turnout.tests.helpers.ranks import run_ranks

FSDP = (("fsdp", True),)
DENSE = (("every", 2),)
SITUATIONS = {
    "plain": {},
    "drops": {"capacity_factor": 0.5},
    "rank without tokens": {"split": (ROWS, 0)},
    "accumulation": {"micro_batches": 2},
    "recomputed": {"recompute": "full"},
    "dense blocks": {"moe": DENSE},
}


def check(case: Case, world: int) -> None:
    expected = reference(dataclasses.replace(case, sizes=(), recompute="none"))
    sorted_by = {layer: "index" if layer < 2 else "source index" for layer in ((1, 3) if case.moe else range(4))}
    for layer, by in sorted_by.items():
        chosen = torch.bincount(gathered(expected, f"ids/{layer}", by)[:, 0], minlength=EXPERTS)
        assert (chosen > 0).sum() > 1
    views = run_ranks(train, world, case)
    for layer, by in sorted_by.items():
        for name in (f"ids/{layer}", f"kept/{layer}"):
            assert torch.equal(gathered(views, name, by), gathered(expected, name, by)), f"routing differs: {name}"
    assert_same_training(views, expected, BOUND[case.dtype])
    for view in views:
        assert distance(torch.tensor(view["curve"]), torch.tensor(expected[0]["curve"])) <= BOUND[case.dtype]


@pytest.mark.parametrize("ep", [2, 1])
def test_two_ranks_compute_what_one_rank_does(ep):
    check(Case(encoder=True, ep=ep, micro_batches=2), world=2)


def test_divided_ranks_compute_what_one_rank_does():
    check(Case(encoder=True, ep=2, sizes=FSDP, moe=DENSE), world=2)


def test_every_parameter_learns():
    grads = reference(Case(encoder=True))[0]["grads"]
    assert [name for name, grad in grads.items() if not float(grad.abs().max())] == []
    assert {"encoder.relative.weight", "blocks.1.cross.wk.weight", "encoder.blocks.0.ffn.experts.w_in"} <= grads.keys()


@pytest.mark.full
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("sizes", [(), FSDP], ids=["whole", "fsdp"])
@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_layout_computes_what_one_rank_does(situation, router, sizes, world, ep):
    changes = dict(SITUATIONS[situation])
    if "split" in changes:
        changes["split"] = (ROWS, 0) if world == 2 else (ROWS - 3, 0, 3, 0)
    check(Case(encoder=True, router=router, ep=ep, sizes=sizes, **changes), world)
