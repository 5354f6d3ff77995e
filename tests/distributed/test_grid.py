"""Engine x recomputation x compilation on two ranks with spread experts: every cell trains what the plainest does.

Bound, in float32 after 3 steps: 1e-5 relative for losses, gradient norms and parameters.
"""

import dataclasses

import pytest
import torch

from turnout.tests.distributed.tiny_training import Case, train, whole
from turnout.tests.helpers.ranks import run_ranks

BOUND = 1e-5
BASE = Case(dtype=torch.float32, ep=2, router="gshard", micro_batches=2, decay=0.1)
PLAINEST = ("native", "none", None)
QUICK = [("native", "full", "aot_eager"), ("deepspeed", "selective", "aot_eager"), ("deepspeed", "full", None)]
ALL = [
    (engine, how, backend)
    for engine in ("native", "deepspeed")
    for how in ("none", "selective", "full")
    for backend in (None, "aot_eager", "inductor")
]


def train_cells(cells) -> list[dict]:
    views = []
    for engine, how, backend in cells:
        torch._dynamo.reset()
        views.append(train(dataclasses.replace(BASE, engine=engine, recompute=how, compile=backend)))
    return views


def check(cells, timeout: float) -> None:
    views = run_ranks(
        train_cells, 2, [PLAINEST, *cells], fresh=True, timeout=timeout, group_timeout=timeout,
        env={"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    (plainest, *others) = zip(*views, strict=True)
    expected = whole(list(plainest), "parameters")
    for cell, ranks in zip(cells, others, strict=True):
        assert ranks[0]["curve"] == pytest.approx(plainest[0]["curve"], rel=BOUND), cell
        norms, wanted = ([step.grad_norm for step in view["steps"]] for view in (ranks[0], plainest[0]))
        assert norms == pytest.approx(wanted, rel=BOUND), cell
        for name, tensor in whole(list(ranks), "parameters").items():
            assert float((tensor - expected[name]).norm()) <= BOUND * float(expected[name].norm()), (cell, name)


def test_a_few_cells_train_alike():
    check(QUICK, timeout=240)


@pytest.mark.full
def test_all_cells_train_alike():
    check(ALL, timeout=900)
