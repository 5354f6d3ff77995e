"""Shifted experts: exactly as if the weights had moved, and undone."""

import copy

import pytest
import torch

from turnout.moe.config import MoEConfig
from turnout.moe.eval.shuffle import shuffled_experts
from turnout.moe.layers.moe import MoE
from turnout.parallel import process
from turnout.parallel.apply import parallelize
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = MoEConfig(width=8, expert_width=4, num_experts=4, top_k=2, router="gshard")
        self.layers = torch.nn.ModuleList(MoE(config, layer) for layer in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x

    def plan(self):
        return {"layers.*.experts.*": "expert"}


X = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_shifting_is_as_if_the_experts_had_moved(shift):
    model = Stack().eval()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for layer in moved.layers:
            for weight in layer.experts.parameters():
                weight.copy_(weight.roll(-shift, 0))
    with shuffled_experts(model, shift):
        shuffled = model(X)
    assert torch.equal(shuffled, moved(X))
    assert not torch.allclose(shuffled, model(X), atol=1e-6)


def test_it_is_undone_even_after_an_error():
    model = Stack().eval()
    before, dispatchers = model(X), [layer.dispatcher for layer in model.layers]
    with pytest.raises(KeyError), shuffled_experts(model):
        raise KeyError
    assert [layer.dispatcher for layer in model.layers] == dispatchers
    assert torch.equal(model(X), before)


def test_equal_experts_do_not_notice():
    model = Stack().eval()
    with torch.no_grad():
        for layer in model.layers:
            for weight in layer.experts.parameters():
                weight.copy_(weight[:1].expand_as(weight))
    with shuffled_experts(model):
        shuffled = model(X)
    assert torch.allclose(shuffled, model(X), atol=1e-6)


def shifted_over_ranks():
    model = Stack().eval()
    parallelize(model, build_mesh(ParallelConfig(ep=process.world())))
    with shuffled_experts(model):
        return model(X).detach()


def test_it_works_with_experts_spread_over_ranks():
    expected = shifted_over_ranks()
    for result in run_ranks(shifted_over_ranks, 2):
        assert torch.allclose(result, expected, atol=1e-6)
