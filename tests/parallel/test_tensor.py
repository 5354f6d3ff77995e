"""Divided layers: what travels, who holds what, and what can not be divided."""

import os
import signal

import pytest
import torch

from turnout import ConfigError, PeerError
from turnout.kernels import cross_entropy
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.init import init_weights
from turnout.moe.train.part import part_of
from turnout.parallel import ParallelConfig, build_mesh, parallelize, process
from turnout.parallel.engine.native import NativeEngine
from turnout.parallel.mesh import Mesh
from turnout.tests.distributed.tiny_training import LENGTH, ROWS, Case, batch_of, build_model, model_config, whole
from turnout.tests.helpers.ranks import run_ranks

BLOCKS = (("heads", 4), ("head_dim", 4))  # with a dense block and a sparse one
SPARSE = (("every", 2),)


def case_of(kv_heads: int) -> Case:
    return Case(dtype=torch.float32, model=(*BLOCKS, ("kv_heads", kv_heads)), moe=SPARSE)


def drawn(case: Case, tp: int) -> dict:
    """This rank's part of the model, made on meta and then drawn."""
    mesh = build_mesh(ParallelConfig(tp=tp), "cpu")
    with torch.device("meta"):
        model = Decoder(model_config(case))
    shards = parallelize(model, mesh)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    init_weights(model, seed=1, shards=shards)
    spec = model.blocks[0].attention.spec
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return {
        "shards": shards,
        "heads": (spec.heads, spec.kv_heads),
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "widths": [(m.out_features, m.in_features) == tuple(m.weight.shape) for m in linears],
    }


@pytest.mark.parametrize(
    ("tp", "kv_heads", "heads", "kv_rows"),
    [(2, 4, (2, 2), 8), (2, 2, (2, 1), 4), (2, 1, (2, 1), 4), (4, 2, (1, 1), 8), (4, 4, (1, 1), 4)],
)
def test_each_rank_draws_its_part_of_the_weights_of_one_rank(tp, kv_heads, heads, kv_rows):
    case = case_of(kv_heads)
    model = Decoder(model_config(case))
    init_weights(model, seed=1)
    views = run_ranks(drawn, tp, case, tp)
    together = whole(views, "parameters")
    assert together.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(together[name], parameter), name
    for rank, view in enumerate(views):
        assert view["heads"] == heads
        assert all(view["widths"])
        sizes = {name: tuple(part.shape) for name, part in view["parameters"].items()}
        assert sizes["blocks.0.attention.wq.weight"] == (16 // tp, 16)
        assert sizes["blocks.0.attention.wk.weight"] == sizes["blocks.0.attention.wv.weight"] == (kv_rows, 16)
        assert sizes["blocks.0.attention.wo.weight"] == (16, 16 // tp)
        assert sizes["blocks.0.ffn.w_in.weight"] == (2 * 24 // tp, 16)
        assert sizes["blocks.0.ffn.w_out.weight"] == (16, 24 // tp)
        gates = model.blocks[0].ffn.w_in.weight[24 // tp * rank : 24 // tp * (rank + 1)]
        assert torch.equal(view["parameters"]["blocks.0.ffn.w_in.weight"][: 24 // tp], gates), "gates come first"
        for name, spec in view["shards"].items():
            divided = sizes.get(name, spec.global_shape) != spec.global_shape
            assert spec.along == ("replicas" if divided else "stage"), name


def refusals() -> list[str]:
    mesh = build_mesh(ParallelConfig(tp=2), "cpu")
    said = []
    for changes in ({"heads": 3}, {"heads": 6, "kv_heads": 3}, {"ffn_width": 23}):
        model = Decoder(model_config(Case(dense=True, model=tuple(changes.items()))))
        with pytest.raises(ConfigError) as error:
            parallelize(model, mesh)
        said.append(str(error.value))
    return said


def test_what_can_not_be_divided_is_refused_by_name():
    assert run_ranks(refusals, 2)[0] == [
        "model.heads (3) must be a multiple of parallel.tp (2): use parallel.tp=1, or other heads",
        "model.kv_heads (3) must divide parallel.tp (2) or be a multiple of it: "
        "use parallel.tp=1, or other K/V heads",
        "parallel.tp (2) must divide the gated output features of blocks.0.ffn.w_in.weight (23): use a divisor of it",
    ]  # fmt: skip


def autocast(tp: int) -> tuple[list[float], set[str]]:
    """The losses of three steps in bfloat16, and the dtypes in which divided layers see their tokens."""
    case = Case(dtype=torch.float32, router="topk_softmax", capacity_factor=None, model=BLOCKS, moe=SPARSE)
    mesh = build_mesh(ParallelConfig(tp=tp), "cpu")
    model = build_model(case)
    shards = parallelize(model, mesh)
    seen: set[str] = set()
    model.blocks[0].ffn.register_forward_pre_hook(lambda _, args: seen.add(f"{args[0].dtype} {len(args[0])}"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, losses = NativeEngine(model, [optimizer], mesh, shards, dtype=torch.bfloat16), []
    for step in range(3):
        part = part_of(batch_of(case, list(range(ROWS)), step), mesh, step=step, seed=9)
        loss = cross_entropy(engine.forward(*part.inputs), part.targets_T).sum() / part.total_tokens
        engine.backward(loss)
        engine.step()
        losses.append(float(process.all_sum(loss)))
    return losses, seen


def test_under_autocast_tokens_travel_in_bfloat16_and_the_losses_are_those_of_one_rank():
    alone, _ = autocast(1)
    for losses, seen in run_ranks(autocast, 2, 2):
        assert seen == {f"torch.bfloat16 {ROWS * LENGTH}"}, "all tokens are gathered, as the products take them"
        assert losses == pytest.approx(alone, rel=3e-3)


def lose_rank_1() -> str:
    mesh: Mesh = build_mesh(ParallelConfig(tp=2, timeout=10.0), "cpu")
    model = build_model(Case(dense=True))
    parallelize(model, mesh)
    if process.rank() == 1:
        model.blocks[0].ffn.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    ctx = VarlenContext(torch.tensor([0, LENGTH]))
    try:
        model(torch.arange(LENGTH // 2), torch.arange(LENGTH), ctx)
    except PeerError as error:
        return str(error)
    return "no error"


def test_a_peer_lost_inside_a_divided_layer_is_an_error_that_names_the_operation():
    message, lost = run_ranks(lose_rank_1, 2, dies=(1,), timeout=60)
    assert message.startswith("sum of a divided layer's outputs failed on rank 0: a peer is gone or hangs")
    assert lost is None
