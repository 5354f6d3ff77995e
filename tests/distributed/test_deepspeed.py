"""The DeepSpeed engines train what the native one trains, on gloo: ZeRO-1 and ZeRO-2 at ep = 2, ZeRO-3 at ep = 1.

Bound, in float32 after 5 steps: 1e-5 relative for losses, norms, clips and parameters (measured: the same bits). Runs
of 10 steps agree in every row within 1e-4, in float32 and bfloat16, and go on from each other's checkpoints. ZeRO-3
adds micro-batches in another order (measured in float32: 1e-7 in every row).
The engines run in processes of their own, because DeepSpeed keeps process-wide state.
"""

import dataclasses

import pytest
import torch

from turnout import ConfigError
from turnout.moe import load_model
from turnout.parallel.apply import parallelize
from turnout.parallel.config import ParallelConfig
from turnout.parallel.engine.deepspeed import DeepSpeedEngine, settings
from turnout.parallel.engine.zero3 import Zero3Engine
from turnout.parallel.mesh import build_mesh
from turnout.tests.distributed.tiny_training import (
    ROWS,
    Case,
    build_engine,
    build_model,
    rows_of,
    run_batch,
    train,
    whole,
)
from turnout.tests.helpers import poison
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, rows, tiny

BOUND = 1e-5
CPU = {"DS_ACCELERATOR": "cpu"}


QUICK = Case(dtype=torch.float32, ep=2, steps=5, router="gshard", micro_batches=2, decay=0.1)
SITUATIONS = [{"optimizer": "sgd"}, {"decay": 0.0}, {"ep": 1}, {"split": (ROWS, 0)}, {"hot": True}]
WHOLE = dataclasses.replace(QUICK, ep=1, recompute="full")  # what ZeRO-3 trains
SITUATIONS_3 = {
    "nothing recomputed": {"recompute": "none"},
    "selective": {"recompute": "selective"},
    "sgd": {"optimizer": "sgd"},
    "dense": {"dense": True},
    "a head of its own": {"model": (("tie_embeddings", False),)},
    "rank without tokens": {"split": (ROWS, 0), "micro_batches": 1},
    "experts without tokens": {"hot": True, "router": "switch", "recompute": "none"},
    "biases": {"moe": (("bias_rate", 0.01), ("router", "deepseek_v3"))},
}


def engines(case: Case, stages: tuple[int, ...] = (1, 2)) -> tuple[dict, ...]:
    """Trained by the native engine and by ZeRO's stages."""
    return train(case), *(train(dataclasses.replace(case, engine="deepspeed", zero=stage)) for stage in stages)


def quick() -> tuple:
    alike, alike_3 = engines(QUICK), engines(WHOLE, (3,))
    return alike, *(resume_and_poison(stage) for stage in (1, 2, 3)), alike_3, why_not_sum()


def why_not_sum() -> str:
    """What DeepSpeed itself says to stage 3 with sums."""
    from deepspeed import DeepSpeedConfig

    try:
        DeepSpeedConfig({**settings(3), "gradient_allreduce_op": "sum"})
    except ValueError as error:
        return str(error)
    return "it works"


@pytest.fixture(scope="module")
def seen() -> list:
    return run_ranks(quick, 2, fresh=True, timeout=300, env=CPU)


def assert_same_training(native: list[dict], deepspeed: list[dict]) -> None:
    assert deepspeed[0]["curve"] == pytest.approx(native[0]["curve"], rel=BOUND)
    for ours, theirs in zip(deepspeed[0]["steps"], native[0]["steps"], strict=True):
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=BOUND)
        assert ours.clip == pytest.approx(theirs.clip, rel=BOUND)
        assert theirs.clip < 1, "the clip must act"
    expected = whole(native, "parameters")
    for name, tensor in whole(deepspeed, "parameters").items():
        assert float((tensor - expected[name]).norm()) <= BOUND * float(expected[name].norm()), name


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_with_spread_experts_trains_as_the_native_engine(seen, stage):
    assert_same_training([all_three[0] for all_three, *_ in seen], [all_three[stage] for all_three, *_ in seen])


def test_zero_3_trains_as_the_native_engine(seen):
    assert_same_training([view[4][0] for view in seen], [view[4][1] for view in seen])


@pytest.mark.full
@pytest.mark.parametrize("situation", SITUATIONS_3)
def test_zero_3_trains_as_the_native_engine_in_every_situation(situation):
    case = dataclasses.replace(WHOLE, **SITUATIONS_3[situation])
    views = run_ranks(engines, 2, case, (3,), fresh=True, timeout=300, group_timeout=200, env=CPU)
    assert_same_training([view[0] for view in views], [view[1] for view in views])
    for name, bias in views[0][0]["biases"].items():
        assert torch.equal(views[0][1]["biases"][name], bias), name


@pytest.mark.full
def test_zero_3_on_three_ranks_trains_as_the_native_engine():
    case = dataclasses.replace(WHOLE, split=(2, 4, 2))
    views = run_ranks(engines, 3, case, (3,), fresh=True, timeout=300, group_timeout=200, env=CPU)
    assert_same_training([view[0] for view in views], [view[1] for view in views])


@pytest.mark.full
@pytest.mark.parametrize("changes", SITUATIONS, ids=str)
def test_zero_trains_as_the_native_engine_in_every_situation(changes):
    case = dataclasses.replace(QUICK, router="switch", micro_batches=1, **changes)
    stages = (1,) if case.split else (1, 2)  # ZeRO-2 wants tokens on every rank, as the engine says
    views = run_ranks(engines, 2, case, stages, fresh=True, timeout=200, env=CPU)
    for stage in stages:
        assert_same_training([view[0] for view in views], [view[stage] for view in views])


def resume_and_poison(stage: int) -> dict:
    """Steps 0 to 3 in one engine; steps 2 and 3 again in a new one that took over the states after step 1."""
    case = Case(dtype=torch.float32, ep=1 if stage == 3 else 2, engine="deepspeed", decay=0.1, zero=stage)
    mesh = build_mesh(ParallelConfig(ep=case.ep), "cpu")
    rows = rows_of(case, mesh.rank, mesh.world)
    model = build_model(case)
    shards = parallelize(model, mesh)
    engine = build_engine(case, model, mesh, shards)
    other = build_model(case)
    parallelize(other, mesh)
    for step in range(4):
        if step == 2:
            again = build_engine(case, other, mesh, shards)
            with engine.whole(), again.whole():
                engine.gather_state()
                fork(model, engine.optimizers[0], other, again)
        set_lr(engine, step)  # set from outside, as the loop does
        run_batch(engine, case, rows, step, last=True)
        engine.step()
    for step in (2, 3):
        set_lr(again, step)
        run_batch(again, case, rows, step, last=True)
        again.step()
    with engine.whole(), again.whole():
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
        before = [p.detach().clone() for p in model.parameters()]
    run_batch(engine, case, rows, 4, last=True)
    if mesh.rank == 1:
        *_, (grad, _) = engine._owned_gradients()
        grad.view(-1)[0] = float("nan")
    bad = engine.step()
    with engine.whole():
        still = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    run_batch(engine, case, rows, 5, last=True)
    good = engine.step()
    run_batch(again, case, rows, 5, last=True)  # what the batch of step 4 left behind would show
    return {
        "resumed": all(same) and any(p.numel() for p in before),
        "finite": [bad.finite, good.finite],
        "still": all(still),
        "forgotten": good.grad_norm == again.step().grad_norm,
    }


def set_lr(engine, step: int) -> None:
    for group in engine.optimizers[0].param_groups:
        group["lr"] = 1e-2 / (1 + step)


def fork(model, optimizer, other, engine) -> None:
    """Write model and optimizer states into another model and its engine, as loading a checkpoint does."""
    with torch.no_grad():
        for source, target in zip(model.parameters(), other.parameters(), strict=True):
            target.copy_(source)
            engine.optimizers[0].state[target] = {k: v.clone() for k, v in optimizer.state[source].items()}
    engine.scatter_state()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_travel_to_a_new_engine(seen, stage):
    assert [view[stage]["resumed"] for view in seen] == [True, True]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_nan_on_one_rank_moves_nothing_under_zero(seen, stage):
    for view in seen:
        assert view[stage]["still"]
        assert view[stage]["finite"] == [False, True]
        assert view[stage]["forgotten"]


def test_deepspeed_can_not_sum_in_stage_3(seen):
    assert all(view[5] == "gradient_allreduce_op='sum' is not supported with ZeRO stage 3" for view in seen)


def test_what_zero_can_not_train_is_refused():
    mesh = build_mesh(ParallelConfig())
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"engine \(deepspeed\) needs at least 2 ranks"):
        DeepSpeedEngine(model, [torch.optim.SGD(model.parameters())], mesh, {})
    two = dataclasses.replace(mesh, world=2)
    with pytest.raises(ConfigError, match=r"optim \(LBFGS\) can not run in ZeRO's flat pieces"):
        DeepSpeedEngine(model, [torch.optim.LBFGS(model.parameters())], two, {})
    spread = dataclasses.replace(two, layout=ParallelConfig(ep=2).resolve(2))
    with pytest.raises(ConfigError, match=r"parallel.zero \(3\) cuts what every rank holds, and parallel.ep \(2\)"):
        Zero3Engine(model, [torch.optim.SGD(model.parameters())], spread, {}, units=())
    with pytest.raises(ConfigError, match="must be float32"):
        DeepSpeedEngine(model.double(), [torch.optim.SGD(model.parameters())], two, {})


def train_runs(root, words: list[str], runs: dict[str, list[str]]) -> list[str]:
    """One run after another in `root`."""
    return [poison.train(f"{root}/{name}", [*words, *more], {}) for name, more in runs.items()]


def assert_same_rows(ours, theirs) -> None:
    """Every training row of `ours` is that of `theirs`, the parameters' first steps included."""
    expected = {row["step"]: row for row in rows(theirs)}
    for row in rows(ours):
        wanted = expected[row["step"]]
        assert row.keys() == wanted.keys()
        for name in ("loss", "aux_loss", "grad_norm", "lr", "tokens", "drop_fraction"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-7), (row["step"], name)
    expected = {row["step"]: row for row in rows(theirs, "eval")}
    for row in rows(ours, "eval"):
        assert row["val_loss"] == pytest.approx(expected[row["step"]]["val_loss"], rel=1e-4), row["step"]


def check_runs(tmp_path, ep: int, stage: int, dtype: str, *more: str, moe: str = "gshard") -> None:
    """10 steps natively and under ZeRO; then each goes on from the other's checkpoint of step 5."""
    zero = ["engine=deepspeed", f"parallel.zero={stage}"]
    middle = {name: f"train.resume={tmp_path / name / 'checkpoints' / 'step-00000005'}" for name in ("native", "zero")}
    runs = {
        "native": [],
        "zero": zero,
        "native after zero": [middle["zero"]],
        "zero after native": [*zero, middle["native"]],
    }
    words = tiny(corpus(tmp_path), f"moe={moe}", "optim=adamw", "train.steps=10", "train.save_every=5", "train.keep=3")
    words += ["optim.clip=0.5", f"parallel.ep={ep}", f"train.dtype={dtype}", "train.eval_every=5", *more]
    ended = run_ranks(train_runs, 2, str(tmp_path), words, runs, fresh=True, timeout=400, env=CPU)
    assert ended == [["done"] * 4] * 2
    for name, steps in zip(runs, (10, 10, 5, 5), strict=True):
        assert len(rows(tmp_path / name)) == steps
        assert_same_rows(tmp_path / name, tmp_path / "native")
        model, wanted = (load_model(tmp_path / run).state_dict() for run in (name, "native"))
        assert max(float((model[key] - wanted[key]).abs().max()) for key in wanted) < 1e-3
    assert min(row["grad_norm"] for row in rows(tmp_path / "native")) > 0.5, "the clip must act"


def test_runs_agree_and_go_on_from_each_other(tmp_path):
    check_runs(tmp_path, ep=2, stage=2, dtype="bfloat16")


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ep", "stage"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3)])
def test_all_runs_agree_and_go_on_from_each_other(tmp_path, ep, stage, dtype):
    check_runs(tmp_path, ep, stage, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_under_zero_3_accumulates_recomputes_and_moves_biases(tmp_path, dtype):
    check_runs(tmp_path, 1, 3, dtype, "train.micro_batch=1", "train.recompute=full", moe="deepseek_v3")
