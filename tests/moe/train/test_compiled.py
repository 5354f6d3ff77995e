"""`train.compile`: the same numbers within rounding, one graph a size, evaluation untouched, and no quiet way out."""

import pytest
import torch
from torch._dynamo.utils import counters

from turnout import ConfigError
from turnout.kernels import cross_entropy
from turnout.moe.config import ModelConfig, MoEConfig
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.init import init_weights
from turnout.moe.routing.record import RouteContext
from turnout.moe.train.compiled import compile_blocks
from turnout.moe.train.recompute import recompute
from turnout.tests.helpers import poison
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, rows, tiny

LENGTH, VOCAB = 8, 40
SPARSE = MoEConfig(width=16, expert_width=8, num_experts=4, top_k=2, router="gshard", every=2, shared_experts=1)
BOUND = 1e-5


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(layers=2, moe=SPARSE, how="none", backend: str | None = "aot_eager"):
    model = Decoder(
        ModelConfig(
            vocab_size=VOCAB, width=16, layers=layers, heads=2, kv_heads=1, head_dim=8, ffn_width=24,
            max_seq_len=LENGTH, moe=moe,
        )
    )  # fmt: skip
    init_weights(model, seed=1)
    if backend:
        compile_blocks(model, backend)
    recompute(model, how)
    return model


def take(model, count, step=0, dtype=None, scale=1.0):
    """Loss and gradients of `count` rows."""
    tokens_T = torch.randint(VOCAB, (count * LENGTH,), generator=torch.Generator().manual_seed(step))
    cu = torch.arange(count + 1) * LENGTH
    ctx = VarlenContext(cu, RouteContext(cu_groups=cu, step=step, seed=3, loss_scale=scale))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits_TV = model(tokens_T, torch.arange(LENGTH).repeat(count), ctx)
    loss = cross_entropy(logits_TV, tokens_T.roll(-1)).mean()
    model.zero_grad()
    (scale * loss).backward()
    return {"loss": loss.detach(), **{name: p.grad / scale for name, p in model.named_parameters()}}


def assert_close(found, expected, bound=BOUND):
    for name, wanted in expected.items():
        assert float((found[name] - wanted).norm()) <= bound * float(wanted.norm()) + 1e-9, name


@pytest.mark.parametrize("how", [pytest.param("none", marks=pytest.mark.full), "selective", "full"])
def test_losses_and_gradients_are_the_eager_ones(how):
    eager, compiled = build(backend=None), build(how=how)
    for step, (count, scale) in enumerate([(2, 1.0), (2, 4.0), (1, 8.0)]):
        assert_close(take(compiled, count, step, scale=scale), take(eager, count, step, scale=scale))


def test_steps_of_one_size_compile_once():
    compiled = build(how="full")
    take(compiled, 2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 4, "something of each block"
    for step in range(1, 5):
        take(compiled, 2, step, scale=2.0**step)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.full
def test_many_blocks_are_compiled_each():
    compiled = build(layers=10, how="selective")
    assert_close(take(compiled, 1), take(build(layers=10, backend=None), 1), bound=1e-4)
    assert not counters["recompile_limit"]


def test_evaluation_is_not_compiled_and_names_are_as_they_were():
    eager, compiled = build(backend=None).eval(), build().eval()
    assert list(compiled.state_dict()) == list(eager.state_dict())
    with torch.no_grad():
        for count in range(1, 12):
            tokens_T, positions_T = torch.arange(count), torch.arange(count)
            contexts = (VarlenContext(torch.tensor([0, count])) for _ in range(2))
            ours, theirs = (m(tokens_T, positions_T, ctx) for m, ctx in zip((compiled, eager), contexts, strict=True))
            assert torch.equal(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 0


def test_too_many_sizes_are_an_error_that_names_the_block():
    compiled = build(layers=1, moe=None)
    message = r"train\.compile \(true\) failed in block 0 \(its inputs have more than 2 sizes"
    with torch._dynamo.config.patch(recompile_limit=2):
        take(compiled, 1)
        take(compiled, 2)
        with pytest.raises(ConfigError, match=message):
            take(compiled, 3)


def failing(graph, inputs):
    raise RuntimeError("no such instruction")


def test_what_can_not_be_compiled_is_an_error_with_its_cause():
    with pytest.raises(ConfigError, match=r"block 0 .*RuntimeError: no such instruction"):
        take(build(backend=failing), 1)


def test_without_a_compiler_the_run_ends_before_it_begins():
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/c++",)})
    message = r"train\.compile \(true\) needs a C\+\+ compiler: install g\+\+, or use train"
    with nowhere, pytest.raises(ConfigError, match=message):
        compile_blocks(Decoder.__new__(Decoder))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_inductor_trains_as_eager_does(dtype):
    eager, compiled = build(backend=None), build(how="full", backend="inductor")
    bound = BOUND if dtype is None else 0.05
    for step in range(2):
        assert_close(take(compiled, 2, step, dtype), take(eager, 2, step, dtype), bound)


@pytest.mark.full
def test_a_run_compiles_and_tells_how_long_once(tmp_path):
    words = tiny(corpus(tmp_path), "moe=gshard", "train.dtype=float32", "train.steps=3", "parallel.ep=2")
    run_ranks(poison.train, 2, str(tmp_path / "eager"), words, {})
    words += ["train.compile=true", "train.recompute=full"]
    run_ranks(poison.train, 2, str(tmp_path / "compiled"), words, {}, timeout=400)
    for found, wanted in zip(rows(tmp_path / "compiled"), rows(tmp_path / "eager"), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    (told,) = rows(tmp_path / "compiled", "compile")
    assert told["step"] == 1
    assert told["compile_seconds"] > 0
