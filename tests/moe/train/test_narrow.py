"""Gradients of experts in bfloat16: where, and that a run steps by the same numbers as with float32."""

import pytest
import torch

from turnout.launch.compose import compose
from turnout.moe.train import setup
from turnout.moe.train.loop import Trainer
from turnout.moe.train.narrow import narrow_gradients
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.runs import corpus

WORDS = (
    "model.width=32", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.head_dim=16", "model.ffn_width=48",
    "model.max_seq_len=32", "data.vocab_size=512", "moe=mixtral", "moe.num_experts=4", "train.seq_len=32",
    "train.global_batch=4", "train.steps=3", "optim=adamw", "optim.clip=0.1", "train.eval_every=null",
)  # fmt: skip


def config(*more, world=1):
    return compose((*WORDS, *more), world=world).config


@pytest.mark.parametrize(
    ("more", "world"),
    [
        (("train.micro_batch=2",), 1),
        (("train.dtype=float32",), 1),
        (("moe.bias=true",), 1),
        (("kernels=reference",), 1),
        (("optim=muon",), 1),
        (("optim.state_dtype=bfloat16",), 1),
        (("parallel.ep=1",), 2),
        (("parallel.ep=2", "parallel.chunks=2"), 2),
    ],
    ids=str,
)
def test_they_are_wide_where_something_is_added_to_them(more, world):
    run = config(*more, world=world)
    assert not narrow_gradients(run, run.layout(world))


def test_they_are_narrow_alone_and_under_expert_parallelism():
    for more, world in (((), 1), (("parallel.ep=2",), 2)):
        run = config(*more, world=world)
        assert narrow_gradients(run, run.layout(world))


def test_a_run_moves_its_weights_to_the_same_bits(tmp_path, monkeypatch):
    run = config(f"data.path={corpus(tmp_path)}", f"data.cache={tmp_path}", "data.vocab_size=400")

    def trained(name):
        (tmp_path / name).mkdir()
        trainer = Trainer(run, tmp_path / name, build_mesh(run.parallel, num_experts=4), lambda: False)
        monkeypatch.setattr(trainer, "_export", lambda: None)
        weights = dict(trainer.setup.model.named_parameters())
        types = {weight.grad_dtype for key, weight in weights.items() if ".experts." in key}
        trainer.run()
        return types, weights

    types, narrow = trained("narrow")
    monkeypatch.setattr(setup, "narrow_gradients", lambda *_: False)
    wide_types, wide = trained("wide")
    assert (types, wide_types) == ({torch.bfloat16}, {torch.float32})
    assert all(torch.equal(narrow[name], wide[name]) for name in wide)
