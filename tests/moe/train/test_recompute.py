"""`train.recompute` costs time, saves memory and changes nothing else: gradients, statistics, traces, runs."""

import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from turnout import ConfigError
from turnout.kernels import cross_entropy
from turnout.launch.compose import compose
from turnout.moe import Decoder, ModelConfig, MoEConfig, RouteContext, VarlenContext
from turnout.moe.models.init import init_weights
from turnout.moe.routing.registry import ROUTERS
from turnout.moe.train.config import TrainConfig
from turnout.moe.train.loop import train
from turnout.moe.train.recompute import recompute
from turnout.moe.train.trace import read_trace
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.memory import Memory
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

HOW = ("none", "selective", "full")
VOCAB, TOKENS = 50, 40
BUSY = {"expert_dropout": 0.25, "min_capacity": 0, "capacity_factor": 0.9, "every": 2, "shared_experts": 1}


class Noting(VarlenContext):
    """Notes which layers show a routing, in order."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shown = []

    def observe(self, layer, routing):
        self.shown.append(layer)
        super().observe(layer, routing)


def busy(router):
    """Dropout, drops, jitter and a loss over the whole step, as far as this router has them."""
    if router in ("hash", "dense", "expert_choice", "sinkhorn"):
        return BUSY
    return BUSY | {"jitter": 0.05, "balance_loss": 0.5, "global_batch_loss": 0.5, "importance_loss": 0.5}


def make(how, router="gshard", layers=4, **changes):
    settings = {"width": 24, "expert_width": 16, "num_experts": 4, "init_scale": 2.0, "router": router} | changes
    model = Decoder(
        ModelConfig(
            vocab_size=VOCAB, width=24, layers=layers, heads=4, kv_heads=2, head_dim=6, ffn_width=32, max_seq_len=64,
            moe=MoEConfig(**settings, noncausal=router in ("expert_choice", "sinkhorn")),
        )
    )  # fmt: skip
    init_weights(model, seed=0)
    recompute(model, how)
    return model


def forward(model, seed=0, length=TOKENS, **route):
    """The loss of one row, and its context."""
    tokens = torch.randint(VOCAB, (length + 1,), generator=torch.Generator().manual_seed(seed))
    cu = torch.tensor([0, length])
    ctx = Noting(cu, RouteContext(cu_groups=cu, token_ids_T=tokens[:-1], seed=3, step=5, **route))
    logits = model(tokens[:-1], torch.arange(length), ctx)
    return cross_entropy(logits, tokens[1:]).sum(), ctx


def step(how, router, dtype=torch.float32):
    """Gradients of two micro-batches, what was summed, and both contexts."""
    model, sums = make(how, router, **busy(router)), []
    tally, contexts = {}, []

    def reducer(own):
        sums.append(own.clone())
        return 2 * own

    for seed in (0, 1):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, ctx = forward(model, seed, tally=tally, reducer=reducer)
        loss.backward()
        contexts.append(ctx)
    return {name: p.grad for name, p in model.named_parameters()}, [*sums, *tally.values()], contexts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_sums_and_routings_are_the_same_bits(router, dtype):
    expected, sums, contexts = step("none", router, dtype)
    assert any(grad is not None and grad.any() for grad in expected.values())
    for how in HOW[1:]:
        found, sums_found, contexts_found = step(how, router, dtype)
        assert [name for name in expected if not same(found[name], expected[name])] == []
        assert len(sums_found) == len(sums)
        assert all(map(torch.equal, sums_found, sums))
        for ours, theirs in zip(contexts_found, contexts, strict=True):
            assert ours.shown == theirs.shown == [1, 3]
            assert all(map(same, tree_leaves(ours.routings), tree_leaves(theirs.routings)))


def same(a, b):
    return a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_backward_pass_shows_no_routing_again_and_leaves_the_first_as_it_was(early_stop):
    with set_checkpoint_early_stop(early_stop):
        loss, ctx = forward(make("full", every=2))
        noted = dict(ctx.routings)
        loss.backward()
    assert ctx.shown == [1, 3]
    assert all(ctx.routings[layer] is routing for layer, routing in noted.items())
    assert not any(part.requires_grad for part in tree_leaves(noted) if part is not None)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("how", HOW)
def test_a_step_leaves_nothing_behind(how, router):
    gc.freeze()  # what is older is not looked at again and again
    model = make(how, router, **busy(router))
    loss, ctx = forward(model)
    loss.backward()
    left = weakref.ref(ctx), StorageWeakRef(ctx.routings[1].probs_TE.untyped_storage())
    del loss, ctx
    gc.collect()
    gc.unfreeze()
    assert left[0]() is None
    assert left[1].expired()


def memory(how, **changes):
    """Bytes kept between forward and backward, and the peak of both, of eight blocks."""
    model = make(how, layers=8, every=2, expert_width=48, **changes)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Memory() as measured:
        loss, ctx = forward(model, length=64)
        kept = measured.living()
        loss.backward()
    assert ctx.shown == [1, 3, 5, 7]
    return kept, measured.peak


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_less_is_kept_and_the_peak_is_lower(activation):
    none, selective, full = (memory(how, activation=activation) for how in HOW)
    assert selective[0] < 0.9 * none[0]
    assert selective[1] < 0.9 * none[1]
    assert full[0] < 0.4 * none[0]
    assert full[1] < 0.6 * none[1]


@pytest.mark.parametrize("how", HOW)
def test_without_gradients_nothing_changes_and_nothing_is_kept(how):
    plain, model = make("none").eval(), make(how).eval()
    assert dict(model.state_dict()).keys() == dict(plain.state_dict()).keys()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Memory() as measured:
            loss, _ = forward(model)
            assert torch.equal(loss, forward(plain)[0])
            assert loss.grad_fn is None
    assert measured.storages


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match=r"train\.recompute"):
        compose(["train.recompute=some"])
    assert TrainConfig().recompute == "none"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def go(root, words, runs):
    """Each run in `runs`: its directory, its further words, and the step at which rank 1 asks to stop."""
    for name, more, stop_after in runs:
        config = compose([*words, *more], world=process.world()).config
        (root / name).mkdir(exist_ok=True)
        asked = iter(range(10**9))
        mesh = build_mesh(config.parallel, "cpu", config.model.moe.num_experts)
        train(config, root / name, mesh, lambda asked=asked, last=stop_after: next(asked) == last)


def told(run):
    """All rows of a run, without its times and what was exchanged."""
    times = ("seconds", "tokens_per_second", "all_to_all")
    both = [row for kind in ("train", "eval") for row in rows(run, kind)]
    return [{key: value for key, value in row.items() if not key.startswith(times)} for row in both]


def decided(run, step):
    return tree_leaves(read_trace(run, step)["layers"])


@pytest.mark.parametrize("moe", ["deepseek_v3", pytest.param("gshard", marks=pytest.mark.full)])
def test_runs_differ_in_nothing_and_go_on_from_each_other_and_replay_each_other(data, tmp_path, moe):
    words = tiny(data, f"moe={moe}", "train.micro_batch=1", "moe.trace=true", "parallel.ep=2", "train.save_every=null")
    runs = [
        ("none", [], None), ("parts", ["train.recompute=full"], 2),
        ("parts", ["train.recompute=selective", "train.resume=true"], None),
        ("replayed", ["train.recompute=full", f"moe.replay={tmp_path / 'none'}"], None),
    ]  # fmt: skip
    run_ranks(go, 2, tmp_path, [*words, "train.steps=4"], runs)
    for name in ("parts", "replayed"):
        assert fingerprint(tmp_path / name, 4) == fingerprint(tmp_path / "none", 4), name
        assert told(tmp_path / name) == told(tmp_path / "none"), name
        for step in range(4):
            assert all(map(torch.equal, decided(tmp_path / name, step), decided(tmp_path / "none", step)))
