"""The layer under torch.compile: equal to eager, few graphs, and routing that is still decided once."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from turnout import NonFiniteError
from turnout.moe import keep_routing
from turnout.moe.layers.ffn import FeedForward
from turnout.tests.moe.layers.making import NAMES, WIDTH, context, gradients, make


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def busy(router="gshard"):
    return make(router, shared_experts=1, shared_gate=True, expert_dropout=0.2, capacity_factor=1.0, min_capacity=0)


def run(layer, call, tokens):
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
    layer.zero_grad()
    y, routing = call(x, context(tokens, seed=2))
    y.square().sum().backward()
    return routing, {"y": y.detach(), "x": x.grad, **gradients(layer)}


def assert_equal(layer, call, tokens):
    expected, found = run(layer, layer, tokens), run(layer, call, tokens)
    assert torch.equal(found[0].ids_TK, expected[0].ids_TK)
    assert torch.equal(found[0].kept_TK, expected[0].kept_TK)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", NAMES)
def test_compiled_is_eager(router):
    layer = busy(router)
    assert_equal(layer, torch.compile(layer, backend="aot_eager"), 20)
    assert counters["stats"]["unique_graphs"] == 1


def test_many_lengths_take_few_graphs():
    layer = busy()
    compiled = torch.compile(layer, backend="aot_eager")
    for tokens in (20, 31, 7, 64, 1, 0, 40, 55, 33, 12):
        assert_equal(layer, compiled, tokens)
    assert counters["stats"]["unique_graphs"] <= 4  # one length, any length, one token, none
    assert not counters["recompile_limit"]


@pytest.mark.full
@pytest.mark.parametrize("router", ["switch", "gshard", "deepseek_v3", "expert_choice"])
def test_inductor_is_eager(router):
    layer = busy(router)
    compiled = torch.compile(layer)
    for tokens in (20, 31, 7):
        assert_equal(layer, compiled, tokens)


def test_evaluation_compiles_too():
    layer = busy().eval()
    compiled, x = torch.compile(layer, backend="aot_eager"), torch.randn(20, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_a_nan_is_an_error_when_compiled():
    compiled = torch.compile(make(), backend="aot_eager")
    with pytest.raises(NonFiniteError):
        compiled(torch.full((3, WIDTH), torch.nan))


class Residual(nn.Module):
    """Somebody's block; counts how often its router selects."""

    def __init__(self, way):
        super().__init__()
        self.moe, self.way, self.selected = make("gshard", shared_experts=1, capacity_factor=1.0), way, 0
        self.inner = nn.Linear(WIDTH, WIDTH)
        select = self.moe.router.select

        def counted(*args):
            self.selected += 1
            return select(*args)

        self.moe.router.select = counted

    def body(self, x):
        return x + self.moe(self.inner(x).tanh())[0]

    def forward(self, x):
        return self.way(self.body, x).sin()


def compiled_inside(function, x):
    return checkpoint(torch.compile(function, backend="aot_eager"), x, use_reentrant=False)


WAYS = {
    "plain": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "keep_routing": lambda function, x: checkpoint(function, x, use_reentrant=False, context_fn=keep_routing),
    "compiled inside": compiled_inside,
}


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_and_compiling_together_route_once(way):
    expected = Residual(lambda function, x: function(x))
    model = Residual(WAYS[way])
    model.load_state_dict(expected.state_dict())
    call = model if way == "compiled inside" else torch.compile(model, backend="aot_eager")
    x = torch.randn(20, WIDTH)
    for module, forward in ((expected, expected), (model, call)):
        forward(x).square().sum().backward()
        assert module.selected == 1
    torch.testing.assert_close(gradients(model), gradients(expected), rtol=1e-5, atol=1e-5)


def test_dense_feed_forward_is_one_graph():
    layer, x = FeedForward(WIDTH, 8), torch.randn(5, WIDTH)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


def test_nobody_imports_the_compiler_who_does_not_compile():
    code = """
import sys, torch
from turnout.moe import MoE, MoEConfig
MoE(MoEConfig(width=8, expert_width=8))(torch.randn(4, 8))[0].sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
