"""Zeros that stay: a pruned model is trained on and stays one, whoever moves its weights and wherever they lie."""

from pathlib import Path

import pytest
import torch

from turnout import ConfigError
from turnout.launch.compose import compose
from turnout.launch.main import main
from turnout.moe.models.store import load_model
from turnout.moe.shapes import is_hidden_matrix
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, rows, tiny


def go(run: str, words: list[str], steps: int | None = None) -> None:
    """Train, up to `steps` steps (None: all)."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    votes = iter(range(10**9))
    mesh = build_mesh(config.parallel, "cpu", config.model.moe.num_experts)
    Trainer(config, Path(run), mesh, lambda: next(votes) == steps).run()


def hidden(path: Path) -> dict[str, torch.Tensor]:
    """The weights whose zeros stay."""
    return {n: w.detach() for n, w in load_model(path).named_parameters() if is_hidden_matrix(n, w.ndim)}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    data = corpus(tmp_path_factory.mktemp("data"))
    return tiny(data, "moe=mixtral", "moe.num_experts=4", "train.dtype=float32", "train.save_every=null", "log.every=1")


@pytest.fixture(scope="module")
def dense(words, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "run"
    go(str(path), [*words, "train.steps=1"])
    return path


@pytest.fixture(scope="module")
def pruned(dense):
    path = dense.parent / "slim"
    how = ("method=magnitude", "pattern=2:4", "speed=false", "samples=2", "max_bytes=500")
    assert main(["compress", str(dense), str(path), *how]) == 0
    return path


OPTIMIZERS = [
    "optim=adamw",
    "optim=muon",
    pytest.param("optim=adamw optim.state_dtype=bfloat16", marks=pytest.mark.full),
    pytest.param("optim=muon optim.state_dtype=bfloat16", marks=pytest.mark.full),
    pytest.param("optim=adafactor", marks=pytest.mark.full),
    pytest.param("optim=adamw train.dtype=bfloat16", marks=pytest.mark.full),  # gradients of experts are narrow
    pytest.param("optim=muon train.dtype=float16", marks=pytest.mark.full),
]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_what_is_zero_stays_zero_and_all_else_moves_also_behind_a_stop(pruned, words, tmp_path, optim):
    words = [*words, *optim.split(), f"train.init={pruned}", "train.keep_zeros=true", "train.steps=4", "optim.clip=0.5"]
    go(str(tmp_path / "once"), words)
    before, after = hidden(pruned), hidden(tmp_path / "once")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0), name
        assert not torch.equal(weight, after[name]), name
    (told,) = rows(tmp_path / "once", "zeros")
    assert told["zeros"] == sum(int((weight == 0).sum()) for weight in before.values())
    assert told["numbers"] == sum(weight.numel() for weight in before.values()) <= 2 * told["zeros"]
    go(str(tmp_path / "twice"), words, 2)
    go(str(tmp_path / "twice"), [*words, "train.resume=true"])
    for name, weight in hidden(tmp_path / "twice").items():
        assert torch.equal(weight, after[name]), name


def test_the_norm_is_of_the_gradients_that_move_something(pruned, words, tmp_path):
    words = [*words, "optim=adamw", f"train.init={pruned}", "train.steps=1"]
    for run, keep in (("all", False), ("kept", True)):
        go(str(tmp_path / run), [*words, f"train.keep_zeros={keep}"])
    whole, kept = ([row["grad_norm"] for row in rows(tmp_path / run)] for run in ("all", "kept"))
    assert kept[0] < 0.95 * whole[0]
    assert all((hidden(tmp_path / "all")[name] != 0).float().mean() > 0.9 for name in ("blocks.0.attention.wq.weight",))


LAYOUTS = [
    ("parallel.tp=2", "optim=muon"),
    ("parallel.ep=2", "optim=muon"),
    ("parallel.fsdp=true", "optim=muon"),
    ("parallel.pp=2", "optim=adamw"),
    ("parallel.tp=2", "optim=adafactor"),
]


@pytest.mark.parametrize(
    ("layout", "optim"),
    [pytest.param(*some, marks=[pytest.mark.full] if at else []) for at, some in enumerate(LAYOUTS)],
)
def test_two_ranks_keep_the_zeros_of_one(pruned, words, tmp_path, layout, optim):
    words = [*words, optim, f"train.init={pruned}", "train.keep_zeros=true", "train.steps=3", "model.layers=2"]
    run_ranks(go, 2, str(tmp_path / "two"), [*words, layout, "train.micro_batch=1"])
    go(str(tmp_path / "one"), [*words, "train.micro_batch=1"])
    for kind in ("zeros", "train"):
        names = ("zeros", "numbers") if kind == "zeros" else ("loss", "grad_norm")
        two, one = ([[row[name] for name in names] for row in rows(tmp_path / run, kind)] for run in ("two", "one"))
        assert two == [pytest.approx(row, rel=1e-4) for row in one]
    two, one = hidden(tmp_path / "two"), hidden(tmp_path / "one")
    for name, weight in hidden(pruned).items():
        assert torch.equal(two[name] == 0, weight == 0), name
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3, msg=name)


def test_without_zeros_or_a_model_it_is_refused(dense, pruned, words, tmp_path):
    keep = [*words, "train.keep_zeros=true"]
    with pytest.raises(
        ConfigError, match=r"train\.keep_zeros \(true\) finds no zeros in .* train\.init \(.*\): prune it"
    ):
        go(str(tmp_path / "dense"), [*keep, f"train.init={dense}"])
    with pytest.raises(
        ConfigError, match=r"train\.keep_zeros \(True\) .* train\.init \(null\) .*: use train\.init=DIR"
    ):
        compose(keep, world=1)
    zero = [*keep, f"train.init={pruned}", "engine=deepspeed", "optim=adamw"]
    with pytest.raises(ConfigError, match=r"train\.keep_zeros \(True\) is not built for engine=deepspeed"):
        compose(zero, world=2)
    go(str(tmp_path / "run"), [*words, f"train.init={pruned}", "train.steps=1"])
    with pytest.raises(ConfigError, match=r"train\.keep_zeros .* can not change on resume"):
        go(str(tmp_path / "run"), [*keep, f"train.init={pruned}", "train.steps=2", "train.resume=true"])
