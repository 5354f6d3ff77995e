"""The MoE layer against a loop over tokens and choices, and what may never change its result."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout import ConfigError, NonFiniteError, kernels
from turnout.moe import MoE, RouteContext
from turnout.moe.config import COEFFICIENTS
from turnout.tests.moe.layers.making import NAMES, context, gradients, make

ACTIVATIONS = {
    "swiglu": lambda h: F.silu(h[: len(h) // 2]) * h[len(h) // 2 :],
    "relu": lambda h: h.clamp(min=0),
    "gelu": F.gelu,
}


def token_by_token(layer, x, routing):
    act = ACTIVATIONS[layer.cfg.activation]
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for expert, weight, kept in zip(routing.ids_TK[t], routing.weights_TK[t], routing.kept_TK[t], strict=True):
            if kept:
                y = y + weight * (act(layer.experts.w_in[expert] @ x[t]) @ layer.experts.w_out[expert])
        if layer.shared is not None:
            gate = 1 if layer.shared_gate is None else (layer.shared_gate.weight[0] @ x[t]).sigmoid()
            y = y + gate * (layer.shared.w_out.weight @ act(layer.shared.w_in.weight @ x[t]))
        rows.append(y)
    return torch.stack(rows) if rows else x


SHARED = {
    "none": {},
    "two": {"shared_experts": 2},
    "wide": {"shared_experts": 1, "shared_width": 20},
    "gated": {"shared_experts": 1, "shared_gate": True},
}


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_output_is_the_weighted_sum_of_the_kept_experts(router, activation, shared, form):
    layer = make(router, activation=activation, capacity_factor=0.7, min_capacity=0, **SHARED[shared])
    x = torch.randn(21, 16)
    with kernels.using(form):
        y, routing = layer(x)
    assert 0 < routing.kept_TK.sum() < routing.kept_TK.numel()
    torch.testing.assert_close(y, token_by_token(layer, x, routing), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", NAMES)
def test_every_router_mixes_what_its_record_says(router, training):
    layer = make(router, capacity_factor=0.7, eval_capacity_factor=0.8, min_capacity=0).train(training)
    x = torch.randn(21, 16)
    y, routing = layer(x, context(21))
    assert router == "dense" or 0 < routing.kept_TK.sum() < routing.kept_TK.numel()
    torch.testing.assert_close(y, token_by_token(layer, x, routing), rtol=1e-5, atol=1e-5)


def test_hidden_width_of_the_shared_experts():
    sizes = {name: make(**changes).shared for name, changes in SHARED.items()}
    assert sizes["none"] is None
    assert [sizes[name].w_out.in_features for name in ("two", "wide", "gated")] == [16, 20, 8]
    gate = make(**SHARED["gated"]).shared_gate
    assert gate.weight.shape == (1, 16)
    assert gate.bias is None
    assert make(**SHARED["two"]).shared_gate is None


@pytest.mark.parametrize("router", NAMES)
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens_work_forwards_and_backwards(router, tokens):
    layer = make(router, experts=8, shared_experts=1, shared_gate=True, expert_dropout=0.1)
    x = torch.randn(tokens, 16, requires_grad=True)
    y, routing = layer(x, context(tokens))
    assert y.shape == x.shape
    layer.eval()
    torch.testing.assert_close(layer(x, context(tokens))[0], token_by_token(layer, x, layer(x, context(tokens))[1]))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert routing.counts_E.sum() == routing.wanted_TK.sum()


def test_one_expert_is_the_dense_network_times_its_gate():
    layer = make(experts=1, capacity_factor=1.0)
    x = torch.randn(9, 16)
    y, routing = layer(x)
    assert (routing.weights_TK == 1).all()
    dense = kernels.swiglu(x @ layer.experts.w_in[0].T) @ layer.experts.w_out[0]
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)


def test_equal_experts_are_the_dense_network_times_the_gate():
    layer = make(experts=4, capacity_factor=None)
    for stack in (layer.experts.w_in, layer.experts.w_out):
        stack.data[:] = stack.data[:1]
    x = torch.randn(9, 16)
    y, routing = layer(x)
    assert len(routing.ids_TK.unique()) > 1
    dense = kernels.swiglu(x @ layer.experts.w_in[0].T) @ layer.experts.w_out[0]
    torch.testing.assert_close(y, routing.weights_TK * dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", [name for name in NAMES if name != "expert_choice"])
def test_dropless_is_infinite_capacity(router):
    found = []
    for factor in (None, 1e6):
        layer, x = make(router, capacity_factor=factor), torch.randn(30, 16, requires_grad=True)
        y, routing = layer(x, context(30))
        y.square().sum().backward()
        found.append((y, routing.kept_TK, x.grad, *gradients(layer).values()))
    assert all(map(torch.equal, *found))


def test_a_dropped_token_gets_nothing():
    layer = make(capacity_factor=0.3, min_capacity=0)
    y, routing = layer(torch.randn(40, 16))
    dropped = ~routing.kept_TK[:, 0]
    assert dropped.any()
    assert (y[dropped] == 0).all()
    assert (y[~dropped] != 0).any(dim=1).all()


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.sampled_from(["switch", "gshard"]), st.sampled_from([None, 0.8]))
def test_renaming_the_experts_changes_no_output(order, router, factor):
    layer, renamed = (make(router, experts=5, capacity_factor=factor, min_capacity=0) for _ in range(2))
    renamed.router.weight.data = layer.router.weight.data[order]
    renamed.experts.w_in.data, renamed.experts.w_out.data = layer.experts.w_in[order], layer.experts.w_out[order]
    x = torch.randn(25, 16, generator=torch.Generator().manual_seed(1))
    (y, routing), (y2, routing2) = layer(x), renamed(x)
    assert torch.equal(torch.tensor(order)[routing2.ids_TK], routing.ids_TK)
    assert torch.equal(routing2.kept_TK, routing.kept_TK)
    torch.testing.assert_close(y2, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_dropless_tokens_do_not_feel_each_other(router):
    layer = make(router, capacity_factor=None).eval()
    x = torch.randn(20, 16)
    together, _ = layer(x, RouteContext(dropless=True))
    order = torch.randperm(20)
    torch.testing.assert_close(layer(x[order])[0], together[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x[3:4])[0], together[3:4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", NAMES)
def test_gradcheck(router):
    changes = dict.fromkeys(COEFFICIENTS, 0.0) | {"width": 3, "expert_width": 2, "expert_dropout": 0.3}
    changes |= {} if router == "hash" else {"jitter": 0.1}
    layer = make(router, shared_experts=1, shared_gate=True, capacity_factor=0.9, **changes).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, context(6)))[0]

    assert torch.autograd.gradcheck(forward, (x, *parameters), atol=1e-4)


def router_gradient(x, **changes):
    layer = make("gshard", capacity_factor=1.0, **changes).double()
    layer(x)[0].square().sum().backward()
    return layer.router.weight.grad


def test_each_configured_loss_reaches_the_router_exactly_once():
    x = torch.randn(30, 16, dtype=torch.float64)
    base = router_gradient(x, balance_loss=0.0, z_loss=0.0)
    for name, coefficient in (("balance", "balance_loss"), ("z", "z_loss")):
        grad = router_gradient(x, **{"balance_loss": 0.0, "z_loss": 0.0} | {coefficient: 3.0})
        layer = make("gshard", capacity_factor=1.0, balance_loss=1.0, z_loss=1.0).double()
        (alone,) = torch.autograd.grad(layer.router(x, RouteContext()).aux[name], layer.router.weight)
        assert alone.abs().max() > 1e-3
        torch.testing.assert_close(grad - base, 3 * alone, rtol=1e-6, atol=1e-6)


def test_loss_scale_multiplies_the_attached_losses():
    x = torch.randn(30, 16)
    grads = []
    for scale in (1.0, torch.tensor(1024.0)):
        layer = make("gshard", balance_loss=0.3)
        (layer(x, RouteContext(loss_scale=scale))[0].square().sum() * scale).backward()
        grads.append({name: grad / scale for name, grad in gradients(layer).items()})
    torch.testing.assert_close(grads[1], grads[0])


def test_a_loss_that_would_train_nothing_is_an_error():
    layer, x = make("gshard"), torch.randn(30, 16)
    layer.router.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"moe\.balance_loss \(0\.01\).*use moe\.balance_loss=0"):
        layer(x)
    y, _ = layer(x.requires_grad_())  # the losses train what made x
    y.sum().backward()
    assert x.grad.any()
    with torch.no_grad():
        layer(x.detach())
    layer.eval()(x.detach())
    frozen = make("gshard", balance_loss=0.0, z_loss=0.0)
    frozen.router.requires_grad_(False)
    frozen(x.detach())[0].sum().backward()
    assert frozen.router.weight.grad is None


def test_a_frozen_layer_wants_no_loss():
    layer = make("gshard").requires_grad_(False)
    assert not layer(torch.randn(30, 16))[0].requires_grad


def test_no_loss_is_attached_in_evaluation():
    x = torch.randn(30, 16)
    layer = make("switch", capacity_factor=None, eval_capacity_factor=None, balance_loss=100.0, z_loss=100.0)
    grads = []
    for module in (layer.eval(), make("switch", capacity_factor=None, balance_loss=0.0, z_loss=0.0)):
        module(x)[0].square().sum().backward()
        grads.append(module.router.weight.grad)
    torch.testing.assert_close(*grads)


def test_nan_in_one_token_reaches_no_other():
    layer = make("gshard", capacity_factor=None)
    x = torch.randn(10, 16)
    clean, _ = layer(x)
    x[4] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 0"):
        layer(x)
    y, _ = layer(x, RouteContext(propagate_nan=True))
    assert y[4].isnan().all()
    others = torch.arange(10) != 4
    assert torch.equal(y[others], clean[others])


def test_padding_may_be_anything():
    layer = make("gshard", shared_experts=1, shared_gate=True)
    x, valid = torch.randn(10, 16), torch.arange(10) < 8
    clean, routing = layer(x, RouteContext(valid_T=valid))
    assert routing.counts_E.sum() == routing.wanted_TK.sum() == routing.wanted_TK[:8].sum()
    x[8:] = torch.nan
    y, _ = layer(x, RouteContext(valid_T=valid))
    assert torch.equal(y[:8], clean[:8])


@pytest.mark.parametrize("router", NAMES)
def test_counts_are_the_wanted_assignments_before_drops(router):
    layer = make(router, capacity_factor=0.5, min_capacity=0)
    _, routing = layer(torch.randn(40, 16), context(40))
    assert torch.equal(routing.counts_E, torch.bincount(routing.ids_TK[routing.wanted_TK], minlength=4))
    assert not (routing.kept_TK & ~routing.wanted_TK).any()


def test_experts_start_within_two_sigma():
    layer = make(experts=64, init_scale=0.1)
    for weight, fan_in in ((layer.experts.w_in, 16), (layer.experts.w_out, 8)):
        sigma = (0.1 / fan_in) ** 0.5
        assert weight.abs().max() <= 2 * sigma
        assert weight.std().item() == pytest.approx(0.88 * sigma, rel=0.03)


def test_layer_number_is_part_of_the_random_key():
    cfg = make("gshard", capacity_factor=None).cfg
    x = torch.randn(200, 16)
    layers = [MoE(dataclasses.replace(cfg), layer=layer) for layer in (0, 1, 1)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    kept = [layer(x)[1].kept_TK for layer in layers]
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])
