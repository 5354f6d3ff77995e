"""FSDP2 divides memory, not numbers: every situation, optimizer and precision gives what one rank or DDP gives."""

import dataclasses

import pytest
import torch

from turnout.launch.compose import compose
from turnout.moe.shapes import is_router
from turnout.moe.train import state
from turnout.moe.train.config import OptimConfig
from turnout.moe.train.part import part_of
from turnout.moe.train.setup import build_model as build_run_model
from turnout.parallel.checkpoint import latest, save
from turnout.parallel.fsdp import own, own_parameters
from turnout.parallel.mesh import build_mesh
from turnout.tests.distributed.test_layouts import BOUND, SITUATIONS, assert_same_training, reference
from turnout.tests.distributed.tiny_training import (
    ROWS,
    Case,
    batch_of,
    build_model,
    rows_of,
    run_step,
    start,
    train,
    whole,
)
from turnout.tests.helpers.ranks import run_ranks

FSDP = (("fsdp", True),)
OPTIMIZERS = {
    "muon": OptimConfig(name="muon", lr=1e-2, weight_decay=0.1),
    "muon bfloat16": OptimConfig(name="muon", lr=1e-2, weight_decay=0.1, state_dtype="bfloat16"),
    "adafactor": OptimConfig(name="adafactor", lr=1e-2, weight_decay=0.1),
    "adamw bfloat16": OptimConfig(name="adamw", lr=1e-2, weight_decay=0.1, state_dtype="bfloat16"),
}


def alone(case: Case) -> list[dict]:
    return reference(dataclasses.replace(case, sizes=(), recompute="none"))


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_divided_ranks_compute_what_one_rank_does(situation, recompute, ep, world):
    changes = dict(SITUATIONS[situation])
    if "split" in changes:
        changes["split"] = (ROWS, 0) if world == 2 else (ROWS - 3, 0, 3, 0)
    case = Case(router="gshard", ep=min(ep, world), sizes=FSDP, recompute=recompute, **changes)
    assert_same_training(run_ranks(train, world, case), alone(case), BOUND[case.dtype])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("world", "ep"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.full)])
def test_an_optimizer_of_whole_matrices_moves_slices_as_it_does_on_one_rank(optimizer, world, ep):
    case = Case(router="gshard", ep=ep, sizes=FSDP, optim=OPTIMIZERS[optimizer])
    assert_same_training(run_ranks(train, world, case), alone(case), BOUND[case.dtype])


@pytest.mark.parametrize("ep", [1, 2])
def test_two_divided_ranks_compute_the_bits_of_two_whole_ones_under_bfloat16(ep):
    case = Case(router="gshard", dtype=torch.float32, ep=ep, autocast=torch.bfloat16)
    divided, undivided = (run_ranks(train, 2, dataclasses.replace(case, sizes=sizes)) for sizes in (FSDP, ()))
    assert divided[0]["curve"] == undivided[0]["curve"]
    for name, weight in whole(undivided, "parameters").items():
        assert torch.equal(whole(divided, "parameters")[name], weight), name


def own_rows(case: Case, engine) -> list[list[int]]:
    return [rows_of(case, engine.mesh.dp_rank, engine.mesh.dp_size)]


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "adamw bfloat16"])
def test_tensor_parallel_slices_move_as_on_one_rank_too(optimizer):
    case = Case(router="gshard", sizes=(("tp", 2),), dense=True, optim=OPTIMIZERS[optimizer])
    expected = alone(case)
    assert_same_training(run_ranks(train, 2, case), expected, BOUND[case.dtype])


def initial(words: list[str]) -> dict:
    """This rank's first weights, of a model that was divided before it had any."""
    config = compose(words).config
    model, shards = build_run_model(config.model, config, build_mesh(config.parallel, "cpu", 4))
    return {"tensors": {name: p.detach() for name, p in own_parameters(model).items()}, "shards": shards}


@pytest.mark.parametrize("ep", [1, 2])
def test_first_weights_do_not_depend_on_the_division(ep):
    words = ["model=tiny", "data.vocab_size=300", "moe.num_experts=4"]
    alone = whole([initial([*words, "nproc=1"])], "tensors")
    views = run_ranks(initial, 2, [*words, "nproc=2", f"parallel.ep={ep}", "parallel.fsdp=true"])
    assert all(torch.equal(weight, alone[name]) for name, weight in whole(views, "tensors").items())


def measure(case: Case) -> dict:
    """Bytes of this rank's parameters and states, and of its parameters after a forward pass without gradients."""
    engine = start(case)
    run_step(engine, case, own_rows(case, engine), 0)
    engine.step()
    states = [t for o in engine.optimizers for kept in o.state.values() for t in kept.values() if torch.is_tensor(t)]
    seen = {"parameters": [own(weight) for weight in engine.model.parameters()], "states": states}
    with torch.no_grad():
        engine.forward(*part_of(batch_of(case, [0], 0), engine.mesh, step=0, seed=9).inputs)
    seen["after evaluation"] = [own(weight) for weight in engine.model.parameters()]
    return {what: sum(tensor.nbytes for tensor in tensors) for what, tensors in seen.items()}


@pytest.mark.parametrize("ep", [1, 2])
def test_a_rank_holds_its_share_of_parameters_and_states_and_the_small_ones(ep):
    """Spread experts are no smaller for it, and nothing is held twice but vectors and routers."""
    case = Case(router="gshard", ep=ep, dtype=torch.float32)
    everything = measure(dataclasses.replace(case, ep=1))["parameters"]
    model = build_model(case)
    small = sum(w.nbytes for name, w in model.named_parameters() if w.ndim == 1 or is_router(name))
    assert small < everything / 10
    for held in run_ranks(measure, 2, dataclasses.replace(case, sizes=FSDP)):
        assert held["parameters"] == held["after evaluation"] == (everything - small) / 2 + small
        assert 2 * held["parameters"] <= held["states"] < 2 * held["parameters"] + 1000, "two moments, and step counts"


def saved_by(case: Case, folder: str) -> dict:
    """Train two steps and save; returns the bits of this rank's part of every tensor, and its place."""
    engine = start(case)
    for step in range(2):
        run_step(engine, case, own_rows(case, engine), step)
        engine.step()
    named = state.tensors(engine.model, engine.optimizers, engine.shards)
    save(folder, 2, named, {}, engine.mesh)
    return views_of(named)


def restored_by(case: Case, folder: str) -> dict:
    """Fill a model that has not moved from the checkpoint; returns what `saved_by` does."""
    engine = start(case)
    state.restore(latest(folder), engine.model, engine.optimizers, engine.shards)
    return views_of(state.tensors(engine.model, engine.optimizers, engine.shards))


def views_of(named) -> dict:
    return {
        "tensors": {name: tensor.detach().clone() for name, (tensor, _) in named.items()},
        "shards": {name: spec for name, (_, spec) in named.items()},
    }


LAYOUTS = {  # ranks, ep, sizes; five experts on two ranks and two experts on four are uneven cuts
    "one rank": (1, 1, ()),
    "ddp": (2, 2, ()),
    "fsdp": (2, 1, FSDP),
    "fsdp ep2 on 4": (4, 2, FSDP),
    "fsdp on 4": (4, 1, FSDP),
}


@pytest.mark.parametrize("optimizer", ["adafactor", "muon bfloat16"])
def test_a_checkpoint_of_any_layout_fills_any_other_to_the_bit(optimizer, tmp_path):
    uneven = {"moe": (("expert_width", 5),), "model": (("head_dim", 6), ("heads", 3))}
    case = Case(router="gshard", dtype=torch.float32, optim=OPTIMIZERS[optimizer], **uneven)

    def held(function, layout: str, folder: str) -> dict:
        world, ep, sizes = LAYOUTS[layout]
        there = dataclasses.replace(case, ep=ep, sizes=sizes)
        views = run_ranks(function, world, there, folder) if world > 1 else [function(there, folder)]
        return whole(views, "tensors")

    for source in ("fsdp on 4", "fsdp ep2 on 4", "ddp"):
        folder = str(tmp_path / source)
        expected = held(saved_by, source, folder)
        assert any("square" in name or "momentum" in name for name in expected)
        for target in LAYOUTS:
            found = held(restored_by, target, folder)
            assert found.keys() == expected.keys()
            different = [name for name in expected if not torch.equal(found[name], expected[name])]
            assert not different, (source, target)


def poison(name: str) -> dict:
    """Two steps; in the first, rank 1 alone finds a NaN in the gradient of its part of `name`."""
    case = Case(router="gshard", ep=2, sizes=FSDP)
    engine = start(case)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    run_step(engine, case, own_rows(case, engine), 0)
    if engine.mesh.rank == 1:
        engine.parameters[name].grad.view(-1)[0] = float("nan")
    bad = engine.step()
    moved = [name for name, p in engine.parameters.items() if not torch.equal(p, before[name])]
    run_step(engine, case, own_rows(case, engine), 1)
    good = engine.step()
    later = [name for name, p in engine.parameters.items() if not torch.equal(p, before[name])]
    return {"finite": [bad.finite, good.finite], "moved": moved, "moved later": len(later) == len(before)}


@pytest.mark.parametrize("name", ["embed.weight", "blocks.1.ffn.router.weight", "blocks.0.ffn.experts.w_in"])
def test_a_non_finite_gradient_of_one_slice_moves_no_parameter_on_any_rank(name):
    assert run_ranks(poison, 2, name) == [{"finite": [False, True], "moved": [], "moved later": True}] * 2


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_may_be_divided(recompute):
    case = Case(router="gshard", ep=2, sizes=FSDP, compile="aot_eager", recompute=recompute)
    expected = alone(dataclasses.replace(case, compile=None))
    assert_same_training(run_ranks(train, 2, case, fresh=True, timeout=300), expected, BOUND[case.dtype])
