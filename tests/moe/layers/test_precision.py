"""Half precision around the layer: the router stays what it is, the losses stay attached, gradients stay whole."""

import copy

import pytest
import torch

from turnout.moe import RouteContext
from turnout.tests.moe.layers.making import LEARNED, NAMES, WIDTH, context, gradients, make

HALVES = (torch.bfloat16, torch.float16)
TOKENS = 30


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("router", NAMES)
def test_autocast_computes_experts_in_half_precision_and_routes_in_full(router, dtype):
    layer = make(router, shared_experts=1, shared_gate=True, capacity_factor=1.0)
    x, ctx = torch.randn(TOKENS, WIDTH), context(TOKENS)
    exact, routing = layer(x, ctx)
    with torch.autocast("cpu", dtype):
        y, half = layer(x, ctx)
    assert torch.equal(half.ids_TK, routing.ids_TK)
    assert torch.equal(half.weights_TK, routing.weights_TK)
    assert half.logits_TE.dtype == half.probs_TE.dtype == torch.float32
    assert all(torch.equal(half.aux[name], loss) for name, loss in routing.aux.items())
    assert y.dtype == dtype
    assert 0 < (y - exact).norm() < 2e-2 * exact.norm()
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES)
def test_the_losses_reach_the_router_through_autocast(dtype):
    x = torch.randn(TOKENS, WIDTH)
    grads = []
    for half in (False, True):
        layer = make("gshard", balance_loss=50.0, z_loss=50.0)  # so that little else is in the gradient
        with torch.autocast("cpu", dtype, enabled=half):
            layer(x)[0].float().sum().backward()
        grads.append(layer.router.weight.grad)
    assert 0 < (grads[1] - grads[0]).norm() < 1e-2 * grads[0].norm()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
@pytest.mark.parametrize("router", NAMES)
def test_casting_the_model_around_it_leaves_the_router_as_it_is(router, cast):
    wide = make(router, shared_experts=1, shared_gate=True)
    model = torch.nn.Sequential(copy.deepcopy(wide))
    before = {name: tensor.clone() for name, tensor in model[0].router.state_dict().items()}
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    layer = model[0]
    dtype = torch.float16 if cast == "half" else torch.bfloat16
    outside = [p.dtype for name, p in layer.named_parameters() if not name.startswith("router.")]
    assert set(outside) == {dtype}
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.router.state_dict().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in layer.router.state_dict().items())
    x = torch.randn(TOKENS, WIDTH, dtype=dtype)
    y, routing = layer(x, context(TOKENS))
    assert y.dtype == dtype
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.ids_TK, wide(x.float(), context(TOKENS))[1].ids_TK)
    y.sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("router", LEARNED)
def test_a_weight_that_arrives_in_half_precision_still_routes_in_full(router):
    """What FSDP's mixed precision does for the time of a forward pass."""
    layer, x = make(router, capacity_factor=1.0), torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    narrow = {name: p.detach().bfloat16() for name, p in layer.router.named_parameters()}
    rounded = {name: p.float() for name, p in narrow.items()}
    found, expected = (torch.func.functional_call(layer.router, w, (x, RouteContext())) for w in (narrow, rounded))
    assert found.logits_TE.dtype == found.weights_TK.dtype == torch.float32
    assert torch.equal(found.logits_TE, expected.logits_TE)
    assert torch.equal(found.ids_TK, expected.ids_TK)


def test_gradient_scaling_scales_the_losses_too():
    """As torch.amp.GradScaler does it: the loss times the scale, the gradients divided by it."""
    x, scale = torch.randn(TOKENS, WIDTH), 2.0**14
    layer = make("gshard", balance_loss=0.3, z_loss=0.1)
    layer(x)[0].square().mean().backward()
    expected = gradients(layer)
    layer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        y, _ = layer(x, RouteContext(loss_scale=torch.tensor(scale)))
    (scale * y.float().square().mean()).backward()
    found = {name: grad / scale for name, grad in gradients(layer).items()}
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
