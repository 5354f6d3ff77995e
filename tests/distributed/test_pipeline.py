"""Pipelines: stages that hold their layers under global names compute what one rank does, whatever the schedule."""

import dataclasses
import os
import signal

import pytest
import torch

from turnout import DataError, PeerError
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.decoder import Decoder
from turnout.parallel import process
from turnout.parallel.apply import parallelize
from turnout.parallel.config import ParallelConfig
from turnout.parallel.engine import pipeline
from turnout.parallel.mesh import build_mesh, ranks_along
from turnout.parallel.pipeline import keep_stages
from turnout.parallel.stages import held
from turnout.tests.distributed.test_layouts import assert_same_training, one_rank
from turnout.tests.distributed.test_matrix import check
from turnout.tests.distributed.test_recompute import assert_same
from turnout.tests.distributed.tiny_training import (
    EXPERTS,
    ROWS,
    Case,
    build_engine,
    build_model,
    model_config,
    rows_of,
    run_step,
    stages_of,
    train,
)  # fmt: skip
from turnout.tests.helpers.ranks import run_ranks

DEEP = (("layers", 4),)
LENGTHS = (5, 0, 9)
UNTIED = (("tie_embeddings", False),)
BALANCE = (("sequence_loss", 0.1), ("z_loss", 0.01))
SO_FAR = (*BALANCE, ("global_batch_loss", 0.1))  # its statistics are those of a step's micro-batches so far


def piped(micro_batches: int = 4, ep: int = 1, pp: int = 2, **changes) -> Case:
    """A case with a pipeline; what `ParallelConfig` knows goes there."""
    sizes = {key: changes.pop(key) for key in ("virtual", "schedule") if key in changes}
    return Case(ep=ep, micro_batches=micro_batches, sizes=tuple({"pp": pp, **sizes}.items()), **changes)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(2, piped(router="gshard", capacity_factor=0.5, moe=BALANCE), id="1f1b-top-2-drops-balance"),
        pytest.param(2, piped(schedule="gpipe", model=UNTIED, decay=0.1), id="gpipe-untied-decay"),
        pytest.param(2, piped(virtual=2, model=DEEP, micro_batches=2), id="interleaved"),
        pytest.param(4, piped(pp=4, model=(*DEEP, *UNTIED), dtype=torch.float32, optimizer="sgd"), id="pp4-float32"),
        pytest.param(4, piped(ep=2, micro_batches=2, capacity_factor=0.5), id="pp2-ep2"),
    ],
)
def test_a_pipeline_computes_what_one_rank_does(world, case):
    check(case, world)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64-adamw", "float32-sgd"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (2, {"schedule": "gpipe"}),
        (2, {"micro_batches": 8}),
        (2, {"virtual": 2}),
        (4, {"virtual": 2, "ep": 2}),
        (4, {"pp": 4, "schedule": "gpipe"}),
        (4, {"micro_batches": 2, "split": (ROWS, 0), "ep": 2}),
    ],
)
def test_every_schedule_and_size_computes_what_one_rank_does(world, sizes, tied, dtype):
    model = DEEP if tied else (*DEEP, *UNTIED)
    optimizer = "adamw" if dtype == torch.float64 else "sgd"
    case = piped(router="gshard", capacity_factor=0.75, moe=BALANCE, model=model, optimizer=optimizer, **sizes)
    check(dataclasses.replace(case, dtype=dtype), world)


@pytest.mark.parametrize("sizes", [{}, {"schedule": "gpipe"}, {"virtual": 2}])
def test_statistics_of_the_step_so_far_are_those_of_one_rank_that_accumulates(sizes):
    case = piped(router="gshard", moe=SO_FAR, model=DEEP, **sizes)
    views = run_ranks(train, 2, case)
    assert_same_training(views, [one_rank(dataclasses.replace(case, sizes=()))], 1e-9)


def train_all(case: Case, settings: tuple[str, ...]) -> list[dict]:
    return [train(dataclasses.replace(case, recompute=how)) for how in settings]


def test_stages_that_recompute_give_the_same_bits():
    for plain, *others in run_ranks(train_all, 4, piped(ep=2, capacity_factor=0.5), ("none", "selective", "full")):
        for other in others:
            assert_same(other, plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("virtual", [1, 2])
def test_ranks_hold_the_model_once_under_its_names_but_for_a_tied_embedding(virtual, tied):
    cfg = model_config(Case(model=(("layers", 5), ("tie_embeddings", tied))))
    with torch.device("meta"):
        whole = Decoder(cfg)
    names = []
    for rank in range(2):
        with torch.device("meta"):
            model = Decoder(cfg)
        keep_stages(model, held(5, 2, virtual, rank), 2 * virtual - 1)
        names += list(model.state_dict())
    assert sorted(names) == sorted([*whole.state_dict(), *(["embed.weight"] if tied else [])])


def test_the_ends_of_a_pipeline_are_its_first_and_last_stage():
    layout = ParallelConfig(pp=3).resolve(6)
    assert ranks_along(layout, "ends") == [[0, 4], [1, 5], [2], [3]]


def engine_for(case: Case, timeout: float = 20.0):
    mesh = build_mesh(dataclasses.replace(case.parallel, timeout=timeout), "cpu", EXPERTS)
    model = build_model(case)
    shards = parallelize(model, mesh)
    keep_stages(model, stages_of(case, model, mesh), mesh.layout.pp * case.parallel.virtual - 1)
    engine = build_engine(case, model, mesh, shards)
    rows = rows_of(case, mesh.dp_rank, mesh.dp_size)
    return engine, [rows[i :: case.micro_batches] for i in range(case.micro_batches)]


def lose_the_last_rank(case: Case, number: int, when: str) -> str:
    """A step; then the last rank gets `number` in the middle of the next one."""
    engine, micro = engine_for(case, timeout=3.0)
    run_step(engine, case, micro, 0)
    engine.step()
    if process.rank() == process.world() - 1:
        last = engine.model.norm.weight
        if when == "backward":
            last.register_hook(lambda _: os.kill(os.getpid(), number))
        else:
            engine.model.norm.register_forward_hook(lambda *_: os.kill(os.getpid(), number))
    try:
        run_step(engine, case, micro, 1)
    except PeerError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("when", "number"),
    [
        pytest.param("forward", signal.SIGKILL, marks=pytest.mark.full),
        ("backward", signal.SIGKILL),
        pytest.param("backward", signal.SIGSTOP, marks=pytest.mark.full),
    ],
)
def test_a_peer_lost_in_a_pipeline_is_a_peer_error_naming_the_exchange(when, number):
    message, lost = run_ranks(lose_the_last_rank, 2, piped(), number, when, dies=(1,), timeout=60)
    assert message.startswith(f"{pipeline.EXCHANGE} failed on rank 0: a peer is gone or hangs")
    assert lost is None


def fail_in_a_stage(where: str) -> str:
    """An error of ours on both ranks, out of the middle of the schedule."""
    case = piped()
    engine, micro = engine_for(case, timeout=2.0)

    def fail(*_):
        raise DataError("told by a stage")

    block = next(iter(engine.model.blocks))
    block.register_forward_hook(fail) if where == "forward" else block.attention.wq.weight.register_hook(fail)
    try:
        run_step(engine, case, micro, 0)
    except (DataError, PeerError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("where", "rank"), [("forward", 0), ("backward", 1)])
def test_an_error_inside_a_stage_stays_what_it_is(where, rank):
    assert run_ranks(fail_in_a_stage, 2, where)[rank] == "told by a stage"


def infer(case: Case) -> list[torch.Tensor | None]:
    """What this rank gets from inference on several batches, one of them empty."""
    engine, _ = engine_for(case)
    engine.model.eval()
    with torch.no_grad():
        return [engine.infer(*sequence(tokens)) for tokens in LENGTHS]


def sequence(tokens: int) -> tuple[torch.Tensor, torch.Tensor, VarlenContext]:
    return torch.arange(tokens), torch.arange(tokens), VarlenContext(torch.tensor([0, tokens], dtype=torch.int32))


@pytest.mark.parametrize("virtual", [1, 2])
def test_inference_passes_every_batch_through_the_stages(virtual):
    case = piped(virtual=virtual, model=DEEP)
    first, last = run_ranks(infer, 2, case)
    assert first == [None, None, None]
    model = build_model(case).eval()
    for tokens, logits_TV in zip(LENGTHS, last, strict=True):
        assert torch.equal(logits_TV, model(*sequence(tokens)))
