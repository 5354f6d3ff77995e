"""Parallelizing a model: each rank keeps its experts, knows their global ids, and all-to-all stands between."""
# ruff: noqa: N802 (M3 is the name of a rule)

import pytest
import torch
import torch.distributed as dist

from turnout import ConfigError
from turnout.moe.models.init import init_weights
from turnout.parallel import ParallelConfig, ShardSpec, build_mesh, parallelize
from turnout.parallel.dispatch.all_to_all import AllToAllDispatcher
from turnout.parallel.dispatch.local import LocalDispatcher
from turnout.tests.distributed.tiny_training import EXPERTS, Case, build_model, model_config
from turnout.tests.helpers.ranks import run_ranks

STACK = "blocks.1.ffn.experts.w_in"


def sliced(on_meta: bool) -> dict:
    """Parallelize with ep = 2; on meta, materialise and initialise only afterwards."""
    mesh = build_mesh(ParallelConfig(ep=2), num_experts=EXPERTS)
    if on_meta:
        with torch.device("meta"):
            from turnout.moe.models.decoder import Decoder

            model = Decoder(model_config(Case()))
    else:
        model = whole_model()
    shards = parallelize(model, mesh)
    if on_meta:
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu")
        init_weights(model, seed=1)
    moe = model.blocks[1].ffn
    return {
        "tensor": model.get_parameter(STACK).detach().clone(),
        "embed": model.embed.weight.detach().clone(),
        "shard": shards[STACK],
        "embed shard": shards["embed.weight"],
        "first": moe.experts.first,
        "dispatcher": type(moe.dispatcher).__name__,
        "names": sorted(shards) == sorted(model.state_dict()),
    }


def whole_model():
    model = build_model(Case(dtype=torch.float32))
    init_weights(model, seed=1)
    return model


@pytest.mark.parametrize("on_meta", [False, True], ids=["materialised", "meta"])
def test_each_rank_holds_its_own_experts_under_their_global_ids(on_meta):
    whole = whole_model()
    expected = whole.get_parameter(STACK).detach()
    for rank, seen in enumerate(run_ranks(sliced, 2, on_meta)):
        first = 2 * rank
        assert seen["first"] == first
        assert seen["shard"] == ShardSpec(tuple(expected.shape), (first, 0, 0), along="edp")
        assert torch.equal(seen["tensor"], expected[first : first + 2])
        assert torch.equal(seen["embed"], whole.embed.weight)
        assert seen["embed shard"] == ShardSpec(tuple(whole.embed.weight.shape), (0, 0))
        assert seen["dispatcher"] == AllToAllDispatcher.__name__
        assert seen["names"]


def test_one_rank_keeps_everything_local():
    model = whole_model()
    before = model.get_parameter(STACK)
    shards = parallelize(model, build_mesh(ParallelConfig()))
    assert model.get_parameter(STACK) is before
    assert isinstance(model.blocks[1].ffn.dispatcher, LocalDispatcher)
    assert all(shards[name].global_shape == tuple(tensor.shape) for name, tensor in model.state_dict().items())


def indivisible() -> str:
    mesh = build_mesh(ParallelConfig(ep=2))
    stand_in = torch.nn.Module()
    stand_in.w = torch.nn.Parameter(torch.zeros(3, 1))
    stand_in.plan = lambda: {"w": "expert"}
    try:
        parallelize(stand_in, mesh)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_experts_that_do_not_divide_are_refused():
    expected = "parallel.ep (2) must divide the experts of w (3): use a divisor of it"
    assert run_ranks(indivisible, 2) == [expected] * 2


def unevenly(experts: int) -> tuple | str:
    mesh = build_mesh(ParallelConfig(ep=3))
    model = torch.nn.Module()
    model.moe = torch.nn.Module()
    model.moe.experts, model.moe.dispatcher = torch.nn.Module(), LocalDispatcher()
    model.moe.experts.w = torch.nn.Parameter(torch.arange(float(experts)))
    model.plan = lambda: {"moe.experts.*": "expert"}
    try:
        shards = parallelize(model, mesh, uneven=True)
    except ConfigError as error:
        return str(error)
    return model.moe.experts.first, model.moe.experts.w.tolist(), shards["moe.experts.w"].offset


def test_M3_serving_places_experts_unevenly_and_leaves_no_rank_without():
    assert run_ranks(unevenly, 3, 5) == [(0, [0, 1], (0,)), (2, [2, 3], (2,)), (4, [4], (4,))]
    expected = "parallel.ep (3) must not exceed the experts of moe.experts.w (2): use 2 or less"
    assert run_ranks(unevenly, 3, 2) == [expected] * 3


def places(ep: int) -> tuple:
    mesh = build_mesh(ParallelConfig(ep=ep, timeout=7.0))
    seconds = mesh.group("ep")._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    rows = [dist.get_process_group_ranks(mesh.group(dim)) for dim in ("ep", "edp")]
    return mesh.rank, mesh.dp_rank, mesh.place["edp"], mesh.ep_rank, rows, seconds


def test_ranks_stand_in_rows_of_ep_neighbours_and_groups_keep_the_time_out():
    assert run_ranks(places, 4, 2) == [
        (0, 0, 0, 0, [[0, 1], [0, 2]], 7.0),
        (1, 1, 0, 1, [[0, 1], [1, 3]], 7.0),
        (2, 2, 1, 0, [[2, 3], [0, 2]], 7.0),
        (3, 3, 1, 1, [[2, 3], [1, 3]], 7.0),
    ]
