"""The layout matrix: dp, ep, tp, pp, cp, FSDP2 and accumulation, in any combination, compute what one rank does.

Per tensor ‖a − b‖ / ‖b‖ against one rank: at most 1e-9 in float64 (AdamW) and 1e-5 in float32 (SGD), for losses,
balance losses, every gradient, the clip coefficient, loss-free biases, and the parameters after 3 steps; the same
experts, the same drops.
"""

import dataclasses

import pytest
import torch

from turnout.tests.distributed.test_layouts import BOUND, assert_same_training, distance, one_rank
from turnout.tests.distributed.tiny_training import Case, gathered, train, whole
from turnout.tests.helpers.ranks import run_ranks

# Routers and losses: what a layout must not change.
MODELS = {
    "top-1 with drops": {"router": "switch", "capacity_factor": 0.5},
    "top-2": {"router": "gshard"},
    "top-2 with drops by probability": {
        "router": "gshard",
        "capacity_factor": 0.75,
        "moe": (("drop_order", "probability"),),
    },
    "dropless": {"router": "topk_softmax", "capacity_factor": None},
    "shared experts": {"router": "topk_softmax", "capacity_factor": None, "moe": (("shared_experts", 1),)},
    "loss-free bias": {
        "router": "deepseek_v3",
        "capacity_factor": None,
        "moe": (("bias_rate", 0.05), ("jitter", 0.0), ("shared_experts", 1)),
    },
    "dense": {"dense": True},
}
# name → (ranks, sizes, other changes). Ranks that divide a row's tokens get micro-batches so small that they cut inside
# rows: a step's rows together divide at a row's end, and nothing of a group would be elsewhere.
LAYOUTS = {
    "tp2": (2, {"tp": 2}, {"micro_batches": 8}),
    "cp2": (2, {"cp": 2}, {"micro_batches": 4}),
    "pp2": (2, {"pp": 2}, {"micro_batches": 2}),
    "fsdp": (2, {"fsdp": True}, {}),
    "dp2 accumulated": (2, {}, {"micro_batches": 4}),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}, {"micro_batches": 8}),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}, {"micro_batches": 4}),
    "fsdp ep2 accumulated": (2, {"fsdp": True, "ep": 2}, {"micro_batches": 2}),
    "dp2 tp2": (4, {"tp": 2}, {"micro_batches": 4}),
    "dp2 tp2 ep4": (4, {"tp": 2, "ep": 4}, {"micro_batches": 4}),
    "dp2 tp2 ep2": (4, {"tp": 2, "ep": 2}, {"micro_batches": 4}),
    "dp2 cp2": (4, {"cp": 2}, {"micro_batches": 2}),
    "dp2 cp2 ep4": (4, {"cp": 2, "ep": 4}, {"micro_batches": 4}),
    "cp2 tp2": (4, {"cp": 2, "tp": 2}, {"micro_batches": 4}),
    "cp2 tp2 ep4": (4, {"cp": 2, "tp": 2, "ep": 4}, {"micro_batches": 4}),
    "cp4": (4, {"cp": 4}, {"micro_batches": 2}),
    "dp2 pp2": (4, {"pp": 2}, {"micro_batches": 4}),
    "dp2 pp2 ep2": (4, {"pp": 2, "ep": 2}, {"micro_batches": 2}),
    "pp2 tp2": (4, {"pp": 2, "tp": 2}, {"micro_batches": 8}),
    "pp2 tp2 ep2": (4, {"pp": 2, "tp": 2, "ep": 2}, {"micro_batches": 8}),
    "pp2 cp2 ep2": (4, {"pp": 2, "cp": 2, "ep": 2}, {"micro_batches": 4}),
    "pp2 interleaved": (2, {"pp": 2, "virtual": 2}, {"micro_batches": 2, "model": (("layers", 4),)}),
    "pp2 gpipe dp2 ep2": (4, {"pp": 2, "schedule": "gpipe", "ep": 2}, {"micro_batches": 4}),
    "pp4": (4, {"pp": 4}, {"micro_batches": 4, "model": (("layers", 4),)}),
    "fsdp dp4 ep2": (4, {"fsdp": True, "ep": 2}, {}),
    "fsdp dp4 ep4": (4, {"fsdp": True, "ep": 4}, {"micro_batches": 2}),
}
QUICK = {
    ("tp2 ep2", "top-1 with drops"),
    ("cp2 ep2", "top-2 with drops by probability"),
    ("pp2", "loss-free bias"),
    ("fsdp ep2 accumulated", "shared experts"),
}
DOCUMENTS = {"documents": True}


def combination(layout: str, model: str) -> tuple[Case, int]:
    """The case and its number of ranks."""
    world, sizes, changes = LAYOUTS[layout]
    sizes, settings = dict(sizes), {**MODELS[model], **changes, **DOCUMENTS}
    ep = 1 if settings.get("dense") else sizes.pop("ep", 1)
    sizes.pop("ep", None)
    return Case(ep=ep, sizes=tuple(sizes.items()), **settings), world


def alone(case: Case) -> list[dict]:
    """The same training on one rank, all rows at once."""
    return [one_rank(dataclasses.replace(case, ep=1, sizes=(), micro_batches=1, split=None))]


def check(case: Case, world: int) -> None:
    expected, views = alone(case), run_ranks(train, world, case)
    for layer in [] if case.dense else range(dict(case.model).get("layers", 2)):
        for name in (f"ids/{layer}", f"kept/{layer}"):
            assert torch.equal(gathered(views, name), gathered(expected, name)), f"routing differs: {name}"
    assert_same_training(views, expected, BOUND[case.dtype])
    if dict(case.moe).get("bias_rate"):
        assert whole(expected, "biases"), "there must be biases to compare"
        for name, bias_E in whole(views, "biases").items():
            assert distance(bias_E, whole(expected, "biases")[name]) <= BOUND[case.dtype], name


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param(layout, model, marks=() if (layout, model) in QUICK else pytest.mark.full)
        for layout in LAYOUTS
        for model in MODELS
    ],
)
def test_any_layout_computes_what_one_rank_does(layout, model):
    check(*combination(layout, model))


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["top-1 with drops", "shared experts"])
def test_any_layout_computes_what_one_rank_does_in_float32(layout, model):
    case, world = combination(layout, model)
    check(dataclasses.replace(case, dtype=torch.float32, optimizer="sgd"), world)
