"""The native engine under faults: a poisoned gradient moves nothing anywhere; a lost peer is a named error."""

import dataclasses
import gc
import os
import signal

import pytest
import torch

from turnout import PeerError
from turnout.parallel import process
from turnout.parallel.apply import parallelize
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.tests.distributed.tiny_training import Case, build_engine, build_model, rows_of, run_batch, train
from turnout.tests.helpers.ranks import run_ranks


def engine_for(case: Case):
    mesh = build_mesh(ParallelConfig(ep=case.ep, timeout=10.0), "cpu")
    model = build_model(case)
    return build_engine(case, model, mesh, parallelize(model, mesh)), rows_of(case, mesh.rank, mesh.world)


def poison_one_rank(ep: int, poisoned: str, value: float) -> dict:
    """Two steps; in the first, rank 1 alone finds `value` in the gradient of `poisoned`."""
    case = Case(ep=ep)
    engine, rows = engine_for(case)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    run_batch(engine, case, rows, step=0, last=True)
    if process.rank() == 1:
        engine.model.get_parameter(poisoned).grad.view(-1)[0] = value
    bad = engine.step()
    moved = [name for name, p in engine.model.named_parameters() if not torch.equal(p, before[name])]
    run_batch(engine, case, rows, step=1, last=True)
    good = engine.step()
    moved_later = [name for name, p in engine.model.named_parameters() if not torch.equal(p, before[name])]
    return {"finite": [bad.finite, good.finite], "moved": moved, "moved later": len(moved_later), "all": len(before)}


@pytest.mark.parametrize(
    ("poisoned", "value"),
    [
        ("blocks.0.ffn.experts.w_in", float("nan")),
        ("norm.weight", float("inf")),
        pytest.param("blocks.0.ffn.experts.w_in", float("inf"), marks=pytest.mark.full),
        pytest.param("norm.weight", float("nan"), marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("ep", [2, 1])
def test_a_non_finite_gradient_on_one_rank_moves_no_parameter_on_any(ep, poisoned, value):
    for seen in run_ranks(poison_one_rank, 2, ep, poisoned, value):
        assert seen["finite"] == [False, True]
        assert seen["moved"] == []
        assert seen["moved later"] == seen["all"], "the next step goes on as if nothing had been"


def overflow_one_rank(ep: int) -> tuple[list[float], list[bool], bool]:
    """Two steps in float16, the first overflows on rank 1: scales, whether lowered, and that nothing moved."""
    case = Case(ep=ep, dtype=torch.float32, autocast=torch.float16)
    engine, rows = engine_for(case)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    scales, told = [engine.loss_scale], []
    for step in range(2):
        run_batch(engine, case, rows, step=step, last=True)
        if process.rank() == 1 and step == 0:
            engine.model.get_parameter("blocks.0.ffn.experts.w_in").grad.view(-1)[0] = torch.inf
        told.append(engine.step().rescaled)
        scales.append(engine.loss_scale)
        if step == 0:
            still = all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    return scales, told, still


@pytest.mark.parametrize("ep", [2, 1])
def test_an_overflow_on_one_rank_halves_the_loss_scale_on_every_rank_and_moves_nothing(ep):
    assert run_ranks(overflow_one_rank, 2, ep) == [([2.0**16, 2.0**15, 2.0**15], [True, False], True)] * 2


def lose_rank_1(ep: int, when: str) -> str:
    case = Case(ep=ep)
    engine, rows = engine_for(case)
    run_batch(engine, case, rows, step=0, last=True)
    engine.step()
    if process.rank() == 1:
        if when == "backward":
            engine.model.norm.weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        run_batch(engine, case, rows, step=1, last=True)
        engine.step()
    except PeerError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("ep", "when", "operation"),
    [
        (2, "forward", "gathering of expert counts"),
        pytest.param(2, "backward", "all-to-all of expert gradients", marks=pytest.mark.full),
        (1, "backward", "sum of the dense gradients"),
    ],
)
def test_a_peer_lost_in_training_is_a_peer_error_naming_the_operation(ep, when, operation):
    message, lost = run_ranks(lose_rank_1, 2, ep, when, dies=(1,), timeout=60)
    assert message.startswith(f"{operation} failed on rank 0: a peer is gone or hangs")
    assert lost is None


def accumulate(last: bool) -> float:
    """How far this rank's dense gradient is from the other's after one backward pass."""
    case = Case()
    engine, rows = engine_for(case)
    run_batch(engine, case, rows, step=0, last=last)
    grad = engine.model.norm.weight.grad
    return float((process.all_sum(grad) - 2 * grad).norm())


def test_gradients_stay_local_until_the_last_micro_batch():
    assert all(gap > 1e-3 for gap in run_ranks(accumulate, 2, False))
    assert run_ranks(accumulate, 2, True) == [0.0, 0.0]


def continue_with_a_new_engine(anew: bool) -> dict:
    """Three SGD steps; with `anew`, the last one in an engine of its own, as after a resume."""
    case = Case(dtype=torch.float32, optimizer="sgd", ep=2)
    mesh = build_mesh(ParallelConfig(ep=2), "cpu")
    model = build_model(case)
    shards = parallelize(model, mesh)
    engine = build_engine(case, model, mesh, shards)
    for step in range(3):
        if anew and step == 2:
            engine = build_engine(case, model, mesh, shards)
        run_batch(engine, case, rows_of(case, mesh.rank, mesh.world), step, last=True)
        engine.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_new_engine_goes_on_bit_for_bit_on_four_ranks():
    for through, resumed in zip(
        *(run_ranks(continue_with_a_new_engine, 4, anew) for anew in (False, True)), strict=True
    ):
        different = [name for name in through if not torch.equal(through[name], resumed[name])]
        assert not different


def threads_after_training(case: Case) -> int:
    train(dataclasses.replace(case, steps=1))
    gc.collect()
    return len(os.listdir("/proc/self/task"))


def threads_of(case: Case) -> tuple[int, int]:
    """Threads of a rank after two trainings, and after two more, each in process groups of its own.

    FSDP2 keeps the groups of the latest for its next start.
    """
    _, second, _, last = (run_ranks(threads_after_training, 2, case)[0] for _ in range(4))
    return second, last


@pytest.mark.parametrize("sizes", [(), (("tp", 2),), (("pp", 2),), (("fsdp", True),)], ids=str)
def test_an_engine_that_is_gone_leaves_no_groups_behind(sizes):
    early, late = threads_of(Case(sizes=sizes, micro_batches=2))
    assert late <= early, "DDP, a schedule or FSDP2 keeps the process groups, two threads each"
