"""One run over 2, 1 and 4 ranks, its experts split anew: the same state to the bit, the same rows, the losses."""

from pathlib import Path

import pytest
import torch

from turnout.launch.compose import compose
from turnout.moe.train import state
from turnout.moe.train.loop import Trainer
from turnout.moe.train.trace import read_trace
from turnout.parallel import process
from turnout.parallel.checkpoint import latest
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.forks import ends, start_ranks
from turnout.tests.helpers.runs import corpus, rows, tiny


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    data = corpus(tmp_path_factory.mktemp("corpus"))
    return tiny(data, "moe=deepseek_v3", "optim=muon", "train.dtype=float32", "moe.trace=true", "train.keep=9")


def go(run: str, words: list[str], until: int) -> int:
    """Resume or begin; 1 if what this rank took up is not, to the bit, its part of the checkpoint. Then train `until`
    a step, as one that is asked to stop."""
    config = compose([*words, "train.resume=true"], world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    trainer = Trainer(config, Path(run), build_mesh(config.parallel, "cpu", 16), lambda: trainer.now.step == until)
    same = True
    if trainer.saver.saved is not None:
        trainer.setup.engine.gather_state()
        named = state.tensors(trainer.setup.model, trainer.setup.engine.optimizers, trainer.setup.shards)
        saved = latest(Path(run) / "checkpoints")
        same = all(torch.equal(t.cpu(), saved.read(name, spec, t.shape)) for name, (t, spec) in named.items())
        assert {name.partition("/")[0] for name in named} == {"model", "optim"}
    trainer.run()
    return int(not same)


def layout(world: int, ep: int, run: Path, words: list[str], until: int) -> None:
    words = [*words, f"parallel.ep={ep}"]
    assert ends(start_ranks(go, world, str(run), words, until)) == [0] * world, (world, ep)


def test_a_run_that_goes_from_2_ranks_to_1_to_4_reads_the_same_rows_and_follows_the_same_losses(words, tmp_path):
    layout(1, 1, tmp_path / "one", words, 6)
    for world, ep, until in ((2, 2, 2), (1, 1, 4), (4, 4, 6)):
        layout(world, ep, tmp_path / "moved", words, until)
    for step in range(6):
        one, other = (read_trace(tmp_path / name, step) for name in ("one", "moved"))
        assert one["index"].tolist() == other["index"].tolist(), "another order of the data"
        assert one["tokens"].tolist() == other["tokens"].tolist()
    last = {row["step"]: row["loss"] for row in rows(tmp_path / "moved")}
    assert last == pytest.approx({row["step"]: row["loss"] for row in rows(tmp_path / "one")}, rel=1e-3)


@pytest.mark.parametrize("written", [(2, 2), pytest.param((4, 4), marks=pytest.mark.full)])
def test_every_layout_takes_up_what_any_layout_wrote_to_the_bit(words, tmp_path, written):
    world, ep = written
    layout(world, ep, tmp_path, words, 2)
    for world, ep in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
        layout(world, ep, tmp_path, words, 2)
