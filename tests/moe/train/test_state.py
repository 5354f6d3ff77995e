"""A run's optimizer states: they fit any layout, and only what they were saved from."""

from pathlib import Path

import pytest
import torch
from torch import nn

from turnout import CheckpointError
from turnout.launch.compose import compose
from turnout.moe.train import state
from turnout.moe.train.adafactor import Adafactor
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.parallel.shard import ShardSpec
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, tiny


def test_means_over_a_part_of_a_matrix_are_never_saved():
    model = nn.Linear(4, 4)
    optimizer = Adafactor(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    shards = {"weight": ShardSpec((4, 4), (0, 0)), "bias": ShardSpec((4,), (0,))}
    assert len(state.tensors(model, [optimizer], shards)) == 5
    with pytest.raises(AssertionError, match="a part of a matrix"):
        state.tensors(model, [optimizer], {**shards, "weight": ShardSpec((8, 4), (4, 0))})


def held(run: str, words: list[str], more: bool) -> dict[str, torch.Tensor]:
    """What this rank's optimizers hold after its run, or (not `more`) after only taking up the saved one."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    trainer = Trainer(config, Path(run), build_mesh(config.parallel, "cpu", 16), lambda: False)
    if more:
        trainer.run()
    trainer.metrics.close()
    named = state.tensors(trainer.setup.model, trainer.setup.engine.optimizers, trainer.setup.shards)
    return {name: tensor.clone() for name, (tensor, _) in named.items() if name.startswith("optim/")}


@pytest.mark.parametrize(
    ("optim", "dtype", "keys"),
    [
        ("optim=adafactor", torch.float32, {"row_square", "column_square"}),
        ("optim=adamw optim.state_dtype=bfloat16", torch.bfloat16, {"exp_avg", "exp_avg_sq"}),
        ("optim=muon optim.state_dtype=bfloat16", torch.bfloat16, {"momentum"}),
    ],
)
def test_states_of_two_ranks_are_those_of_one_after_resuming_to_the_bit(tmp_path, optim, dtype, keys):
    words = tiny(corpus(tmp_path), *optim.split(), "train.steps=3", "train.save_every=null")
    run = str(tmp_path / "run")
    two = run_ranks(held, 2, run, [*words, "parallel.ep=2"], True)
    one = held(run, [*words, "train.resume=true"], False)
    again = run_ranks(held, 2, run, [*words, "parallel.ep=2", "train.resume=true"], False)
    assert one.keys() == two[0].keys()
    spread = {name for name in one if ".experts." in name}
    assert {name.rpartition("/")[2] for name in spread} == keys
    for name, tensor in one.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, torch.cat([two[0][name], two[1][name]]) if name in spread else two[0][name]), name
        assert all(torch.equal(again[rank][name], two[rank][name]) for rank in range(2)), name


def test_states_do_not_resume_in_another_type(tmp_path):
    words = tiny(corpus(tmp_path), "optim=adamw", "train.steps=1")
    held(str(tmp_path / "run"), words, True)
    with pytest.raises(CheckpointError, match=r"exp_avg \('BF16'.* is \('F32'"):
        held(str(tmp_path / "run"), [*words, "optim.state_dtype=bfloat16", "train.resume=true"], False)
