"""Context parallelism over real ranks: attention, every router that looks at other tokens, losses, recomputation.

Per tensor ‖a − b‖ / ‖b‖ against one rank: at most 1e-9 in float64.
"""

import collections
import dataclasses
from pathlib import Path

import pytest
import torch

from turnout.launch.compose import compose
from turnout.moe.layers.context import AttentionSpec, Heads
from turnout.moe.models.context import VarlenContext
from turnout.moe.train.loop import train as train_run
from turnout.parallel import context, process
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.parallel.spread import Spread
from turnout.tests.distributed.test_layouts import BOUND, assert_same_training, distance, one_rank
from turnout.tests.distributed.test_recompute import assert_same
from turnout.tests.distributed.tiny_training import ROWS, Case, gathered, train
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, rows, tiny

# Attention ------------------------------------------------------------------------------------------------------------

TOKENS = 48
DOCUMENTS = {
    "one": [0, TOKENS],
    "several in a piece": [0, 3, 5, 20, 21, 40, TOKENS],
    "across pieces": [0, 11, 37, TOKENS],
    "of a piece": list(range(0, TOKENS + 1, TOKENS // 4)),
    "empty": [0, 0, 13, 13, 13, TOKENS],
}


def attend(borders, window, heads):
    """Attention here: tokens, output, and the gradients of q, k and v under a loss that knows each token."""
    mesh = build_mesh(ParallelConfig(cp=process.world()))
    generator = torch.Generator().manual_seed(5)
    q, k, v, grad = (
        torch.randn(TOKENS, count, size, generator=generator, dtype=torch.float64)
        for count, size in ((heads[0], 8), (heads[1], 8), (heads[1], 6), (heads[0], 6))
    )
    spread = Spread.of(mesh, TOKENS) if mesh.world > 1 else None
    mine = slice(None) if spread is None else spread.attended_A
    q, k, v = (tensor[mine].requires_grad_() for tensor in (q, k, v))
    spec = AttentionSpec(layer=0, heads=heads[0], kv_heads=heads[1], head_dim=8, scale=0.3, window=window)
    ctx = VarlenContext(torch.tensor(borders), spread=spread)
    out = ctx.attend(spec, q, Heads(k, v))
    tokens = torch.arange(TOKENS)[mine]
    return tokens, out.detach(), *torch.autograd.grad(out, (q, k, v), grad[mine])


@pytest.mark.parametrize("heads", [(4, 2), pytest.param((2, 2), marks=pytest.mark.full)])
@pytest.mark.parametrize("window", [None, 9, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("borders", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_attention_over_ranks_is_that_of_one(world, borders, window, heads):
    _, *expected = attend(borders, window, heads)
    views = run_ranks(attend, world, borders, window, heads)
    order = torch.cat([view[0] for view in views]).argsort()
    for number, truth in enumerate(expected):
        found = torch.cat([view[1 + number] for view in views])[order]
        assert distance(found, truth) <= 1e-12


def gradient_of_keys(terms):
    """What a key's gradient becomes when each rank's term of it is this rank's of `terms`."""
    mesh = build_mesh(ParallelConfig(cp=4))
    spread = Spread.of(mesh, 8)
    k, v = (torch.ones(2, 1, 1, dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    whole_k, whole_v = context.gather_keys(k, v, spread)
    (terms[mesh.rank] * whole_k + whole_v).sum().backward()
    return k.grad.flatten().tolist()


def test_gradients_of_keys_are_summed_in_float32():
    # bfloat16 has steps of 2 above 256: one after another, 1 and 1 would be lost
    assert run_ranks(gradient_of_keys, 4, (256.0, 1.0, 1.0, 0.0)) == [[258.0, 258.0]] * 4


# Training -------------------------------------------------------------------------------------------------------------

# Ranks, sizes, ep. Many rows divide between rows: only in micro-batches of few are rows cut inside.
LAYOUTS = [
    pytest.param((2, (("cp", 2),), 1), id="cp2"),
    pytest.param((4, (("cp", 2),), 2), id="dp2 cp2 ep2", marks=pytest.mark.full),
    pytest.param((4, (("cp", 4),), 4), id="cp4 ep4", marks=pytest.mark.full),
]


def moe(**settings):
    return {"moe": tuple(settings.items())}


BALANCED = {"balance_loss": 0.1, "device_loss": 0.1, "device_groups": 2, "importance_loss": 0.1}
DROPS = {  # decisions that depend on other tokens of the row
    "choice_major": {"router": "gshard", "capacity_factor": 0.75, **moe(drop_order="choice_major")},
    "random": {"capacity_factor": 0.5, **moe(drop_order="random")},
    "probability": {"router": "gshard", "capacity_factor": 0.75, **moe(drop_order="probability", expert_dropout=0.2)},
    "rerouted": {"router": "gshard", "capacity_factor": 0.5, **moe(drop_order="choice_major", reroute=2)},
    "hash": {"router": "hash", "capacity_factor": 0.5, **moe(top_k=1, jitter=0.0)},
    "expert_choice": {"router": "expert_choice", "capacity_factor": 0.75, **moe(noncausal=True)},
    "sinkhorn": {"router": "sinkhorn", "capacity_factor": None, **moe(top_k=1)},
    "deepseek_v3": {"router": "deepseek_v3", "capacity_factor": 0.75, **moe(sequence_loss=0.1, jitter=0.0)},
}
LOSSES = {  # statistics over other tokens of the row, or of the step
    f"{router} {over}": {"router": router, "capacity_factor": None, **moe(**losses, balance_over=over)}
    for over in ("sequence", "global_batch")
    for router, losses in {
        "noisy_topk": {**BALANCED, "load_loss": 0.1},
        "deepseek_v3": {**BALANCED, "sequence_loss": 0.1, "jitter": 0.0},
    }.items()
}


def check(settings, layout, micro_rows):
    """Train in micro-batches of so many rows, None = all."""
    world, sizes, ep = layout
    case = Case(documents=True, **settings)
    expected = [one_rank(case)]
    micro = ROWS // (world // dict(sizes)["cp"]) // micro_rows if micro_rows else 1
    views = run_ranks(train, world, dataclasses.replace(case, sizes=sizes, ep=ep, micro_batches=micro))
    for name in ("ids/0", "kept/0", "ids/1", "kept/1"):
        assert torch.equal(gathered(views, name), gathered(expected, name)), f"routing differs: {name}"
    assert_same_training(views, expected, BOUND[torch.float64])
    return expected[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", DROPS.values(), ids=DROPS)
def test_decisions_that_look_at_other_tokens_are_those_of_one_rank(settings, layout):
    expected = check(settings, layout, micro_rows=2)
    ids, kept = expected["parts"][0]["ids/0"], expected["parts"][0]["kept/0"]
    assert kept.any()
    assert settings["capacity_factor"] is None or kept.float().mean() < 84 / 96, "12 of 96 tokens are padding"
    assert ids.unique().numel() > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_balance_losses_are_those_of_one_rank(settings, layout):
    per_row = dict(settings["moe"])["balance_over"] == "sequence"  # over the step accumulation is outside the promise
    parts = check(settings, layout, micro_rows=2 if per_row else None)["parts"][0]
    assert {"balance/0", "device/0", "importance/0"} < parts.keys()


def counted(case):
    """`train`, with how often each kind of collective over a row ran."""
    calls: collections.Counter[str] = collections.Counter()
    originals = {name: getattr(Spread, name) for name in ("gather", "sum")}

    def counting(name):
        def call(spread, values):
            calls[name] += 1
            return originals[name](spread, values)

        return call

    for name in originals:
        setattr(Spread, name, counting(name))
    try:
        return train(case) | {"calls": dict(calls)}
    finally:
        for name, original in originals.items():
            setattr(Spread, name, original)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputation_gives_the_same_bits_and_neither_gathers_nor_sums_over_the_row_again(how):
    case = Case(
        router="gshard", dtype=torch.float32, capacity_factor=0.75, documents=True, ep=2, sizes=(("cp", 2),),
        micro_batches=2, **moe(sequence_loss=0.1, importance_loss=0.1),
    )  # fmt: skip
    plain, again = (run_ranks(counted, 2, dataclasses.replace(case, recompute=what)) for what in ("none", how))
    for ours, theirs in zip(again, plain, strict=True):
        assert_same(ours, theirs)
        layers, passes = 2, case.steps * case.micro_batches
        assert ours["calls"] == theirs["calls"] == {"gather": layers * passes, "sum": 3 * layers * passes}


def test_a_dropless_router_gathers_nothing():
    case = Case(router="topk_softmax", capacity_factor=None, sizes=(("cp", 2),), **moe(balance_loss=0.0))
    assert all("gather" not in view["calls"] for view in run_ranks(counted, 2, case))


# Whole runs -----------------------------------------------------------------------------------------------------------


def go(run, words):
    """Train as this rank of however many there are."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    train_run(config, Path(run), build_mesh(config.parallel, "cpu", config.model.moe.num_experts), lambda: False)


def assert_same_rows(ours, theirs, steps):
    """Training and evaluation at these steps tell the same: in float32, and rounding grows from step to step."""
    names = {"train": ("loss", "aux_loss", "z_loss", "grad_norm", "router_entropy"), "eval": ("val_loss",)}
    for kind, compared in names.items():
        found, wanted = ({row["step"]: row for row in rows(run, kind)} for run in (ours, theirs))
        assert [step for step in steps if step in wanted] == list(found), kind
        for step, row in found.items():
            for name in compared:
                torch.testing.assert_close(row[name], wanted[step][name], rtol=1e-3, atol=1e-5, msg=f"{name} at {step}")


def test_a_run_writes_the_rows_of_one_rank_and_goes_on_at_another_layout(tmp_path):
    words = tiny(
        corpus(tmp_path), "moe=gshard", "moe.capacity_factor=0.75", "train.dtype=float32", "train.eval_every=2"
    )
    two_ranks = ["train.micro_batch=1", "parallel.cp=2", "parallel.ep=2"]  # every row on both ranks
    runs = {name: tmp_path / name for name in ("one", "two", "one from two", "two from one")}
    go(str(runs["one"]), words)
    run_ranks(go, 2, str(runs["two"]), [*words, *two_ranks])
    go(str(runs["one from two"]), [*words, f"train.resume={runs['two']}/checkpoints/step-00000004"])
    again = [*words, *two_ranks, f"train.resume={runs['one']}/checkpoints/step-00000004"]
    run_ranks(go, 2, str(runs["two from one"]), again)
    assert rows(runs["two"])[0]["expert_load"] == rows(runs["one"])[0]["expert_load"]
    assert rows(runs["two"])[0]["drop_fraction"] == rows(runs["one"])[0]["drop_fraction"] > 0
    assert rows(runs["two"])[0]["loss"] == pytest.approx(rows(runs["one"])[0]["loss"], rel=1e-6)
    assert_same_rows(runs["two"], runs["one"], range(1, 7))
    assert_same_rows(runs["one from two"], runs["one"], (5, 6))
    assert_same_rows(runs["two from one"], runs["one"], (5, 6))
