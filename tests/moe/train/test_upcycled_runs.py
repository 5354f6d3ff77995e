"""Runs that start from a stranger's dense checkpoint, as it is or made sparse, at every layout."""

from pathlib import Path

import pytest
import torch

from turnout.launch.compose import compose
from turnout.moe.data.tokenizer import Tokenizer
from turnout.moe.families.reading import open_source, whole_shapes
from turnout.moe.families.upcycle import Upcycled
from turnout.moe.models.store import load_config, load_model
from turnout.moe.train import loop, state
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.tests.distributed.tiny_training import whole
from turnout.tests.helpers.llama import llama
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows

SPARSE = ["upcycle.num_experts=4", "upcycle.granularity=2", "upcycle.top_k=2", "upcycle.noise=0.01"]
LAYOUTS = [
    pytest.param(["parallel.ep=2"], id="ep"),
    pytest.param(["parallel.tp=2"], id="tp", marks=pytest.mark.full),
    pytest.param(["parallel.fsdp=true"], id="fsdp", marks=pytest.mark.full),
    pytest.param(["parallel.fsdp=true", "parallel.ep=2"], id="fsdp and ep", marks=pytest.mark.full),
    pytest.param(["parallel.pp=2", "train.micro_batch=2"], id="pp", marks=pytest.mark.full),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture
def words(dense, tmp_path):
    data = corpus(tmp_path)
    return [
        f"train.init={dense}", f"data.path={data}", f"data.cache={tmp_path}", "train.seq_len=32",
        "train.global_batch=4", "train.steps=4", "train.save_every=2", "train.dtype=float32", "log.every=1",
        "optim=adamw", "optim.lr=0.001", "nproc=1",
    ]  # fmt: skip


def trainer(run: str, words: list[str], steps: int | None) -> Trainer:
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    moe, votes = config.model.moe, iter(range(10**9))
    mesh = build_mesh(config.parallel, "cpu", moe.num_experts if moe else None)
    return Trainer(config, Path(run), mesh, lambda: next(votes) == steps)


def go(run: str, words: list[str], steps: int | None = None) -> loop.Outcome:
    """Take up to `steps` steps; None: all, then evaluate and export."""
    return trainer(run, words, steps).run()


def start(run: str, words: list[str]) -> dict:
    """What this rank begins with, and where it lies."""
    begun = trainer(run, words, 0)
    begun.metrics.close()
    named = state.tensors(begun.setup.model, (), begun.setup.shards)
    return {
        "state": {name: tensor.clone() for name, (tensor, _) in named.items()},
        "shards": {name: place for name, (_, place) in named.items()},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sparse", [pytest.param([], id="dense", marks=pytest.mark.full), SPARSE], ids=str)
def test_every_layout_starts_from_the_checkpoint_s_tensors(dense, words, tmp_path, layout, sparse):
    if not sparse and "parallel.ep=2" in layout:
        layout = [word for word in layout if word != "parallel.ep=2"]
    config = compose([*words, *sparse], world=1).config
    begun = whole(run_ranks(start, 2, str(tmp_path / "run"), [*words, *sparse, *layout]), "state")
    with open_source(dense) as source:
        made = Upcycled(source, config.upcycle) if sparse else source
        assert {name.removeprefix("model/") for name in begun} == whole_shapes(made.cfg).keys()
        for name, weight in begun.items():
            assert torch.equal(weight.flatten(), made.read(name.removeprefix("model/")).flatten()), name


def test_an_upcycled_run_begins_at_the_dense_loss_trains_on_two_ranks_as_on_one_and_resumes(dense, words, tmp_path):
    sparse = [*words, "upcycle.num_experts=8", "upcycle.granularity=2"]
    go(str(tmp_path / "dense"), [*words, "train.steps=1"])
    go(str(tmp_path / "one"), sparse)
    run_ranks(go, 2, str(tmp_path / "two"), [*sparse, "parallel.ep=2"], 2)
    run_ranks(go, 2, str(tmp_path / "two"), [*sparse, "parallel.ep=2", "train.resume=true"])
    one, two = ([row["loss"] for row in rows(tmp_path / run)] for run in ("one", "two"))
    assert one[0] == pytest.approx(rows(tmp_path / "dense")[0]["loss"], rel=1e-5)
    assert two == pytest.approx(one, rel=1e-5)
    model = load_model(tmp_path / "two")
    assert model.cfg.moe_layers == (1, 3)
    experts = model.blocks[1].ffn.experts.w_in
    assert not torch.equal(experts[0], experts[2]), "copies of one shard have parted"


def test_a_resumed_run_is_the_same_bits(words, tmp_path):
    sparse = [*words, *SPARSE]
    go(str(tmp_path / "whole"), sparse)
    go(str(tmp_path / "halves"), sparse, 2)
    go(str(tmp_path / "halves"), [*sparse, "train.resume=true"])
    assert fingerprint(tmp_path / "halves", 4) == fingerprint(tmp_path / "whole", 4)


def test_the_exported_model_keeps_the_tokenizer_and_can_be_started_from(dense, words, tmp_path):
    go(str(tmp_path / "first"), [*words, *SPARSE, "train.steps=1"])
    theirs, ours = Tokenizer.load(dense), Tokenizer.load(tmp_path / "first" / "model")
    assert ours.digest == theirs.digest
    assert load_config(tmp_path / "first").eos_token_id == theirs.eos_id
    again = [word for word in words if not word.startswith("train.init=")]
    config = compose([*again, f"train.init={tmp_path / 'first'}"]).config
    assert config.model == load_config(tmp_path / "first")
    begun = start(str(tmp_path / "second"), [*again, f"train.init={tmp_path / 'first'}"])["state"]
    for name, weight in load_model(tmp_path / "first").state_dict().items():
        assert torch.equal(begun[f"model/{name}"].flatten(), weight.flatten()), name
