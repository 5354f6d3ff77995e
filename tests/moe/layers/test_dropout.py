"""Expert dropout: which units vanish, and that no layout, order or recomputation draws them anew."""

import pytest
import torch

from turnout.kernels import uniform
from turnout.kernels.random import DROPOUT
from turnout.moe import RouteContext
from turnout.tests.moe.layers.making import NAMES, context, make


def relu_layer(router="gshard", **changes):
    """An expert's output row tells its hidden units: identity weights, all units 1."""
    layer = make(router, activation="relu", expert_width=16, capacity_factor=None, **changes)
    layer.experts.w_in.data[:] = torch.eye(16)
    layer.experts.w_out.data[:] = torch.eye(16)
    return layer


def test_units_vanish_by_the_documented_key_and_the_others_grow():
    layer = relu_layer("switch", expert_dropout=0.4, layer=6)
    index = torch.randint(0, 1 << 40, (50,))
    y, routing = layer(torch.ones(50, 16), RouteContext(index_T=index, step=3, seed=9))
    dropped = uniform(9, index, step=3, layer=6, purpose=DROPOUT, count=16) < 0.4
    torch.testing.assert_close(y, routing.weights_TK * (~dropped).float() / 0.6)
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.05)


def test_each_choice_of_a_token_draws_for_itself():
    layer = relu_layer("gshard", expert_dropout=0.4, second_policy="all")
    y, routing = layer(torch.ones(50, 16), RouteContext(seed=9))
    keys = torch.arange(100)
    kept = (uniform(9, keys, step=0, layer=0, purpose=DROPOUT, count=16) >= 0.4).view(50, 2, 16)
    torch.testing.assert_close(y, (routing.weights_TK[..., None] * kept).sum(1) / 0.6)


def test_expected_output_is_that_without_dropout():
    layer = relu_layer("switch", expert_dropout=0.4)
    x = torch.rand(4000, 16)
    y, routing = layer(x)
    torch.testing.assert_close(y.sum(0), (routing.weights_TK * x).sum(0), rtol=0.05, atol=0)


def test_shared_experts_lose_nothing():
    layer = make("switch", shared_experts=1, expert_dropout=0.5)
    layer.experts.w_out.data.zero_()
    x = torch.randn(20, 16)
    assert torch.equal(layer(x)[0], layer.shared(x))


@pytest.mark.parametrize("router", NAMES)
def test_order_and_company_of_tokens_change_no_draw(router):
    layer = make(router, expert_dropout=0.3, capacity_factor=1e6, balance_loss=0.0)
    layer.router.select = layer.router.eval().select  # choices that do not look at other tokens
    x, order, ctx = torch.randn(20, 16), torch.randperm(20), context(20)
    y, _ = layer(x, ctx)
    shuffled = RouteContext(index_T=order, token_ids_T=ctx.token_ids_T[order])
    torch.testing.assert_close(layer(x[order], shuffled)[0], y[order], rtol=1e-5, atol=1e-6)
    alone = RouteContext(index_T=torch.tensor([7]), token_ids_T=ctx.token_ids_T[7:8])
    torch.testing.assert_close(layer(x[7:8], alone)[0], y[7:8], rtol=1e-5, atol=1e-6)


def test_off_in_evaluation_and_at_zero():
    x = torch.randn(20, 16)
    layer, without = make("switch", expert_dropout=0.5), make("switch")
    assert not torch.equal(layer(x)[0], without(x)[0])
    assert torch.equal(layer.eval()(x)[0], without.eval()(x)[0])


def test_steps_and_seeds_draw_anew():
    layer, x = make("switch", expert_dropout=0.5), torch.randn(20, 16)
    outputs = [layer(x, RouteContext(step=step, seed=seed))[0] for step, seed in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
