"""Activation checkpointing: whatever is recomputed, the routing is not."""

import threading
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from turnout import ConfigError
from turnout.moe import keep_routing
from turnout.moe.routing import recompute
from turnout.parallel.dispatch.local import LocalDispatcher
from turnout.tests.moe.layers.making import LEARNED, NAMES, WIDTH, assert_same, context, gradients, make

TOKENS = 24
plain = partial(checkpoint, use_reentrant=False)
kept = partial(checkpoint, use_reentrant=False, context_fn=keep_routing)
to_the_end = partial(checkpoint, use_reentrant=False, early_stop=False)
saving = partial(
    checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE),
)


def offloading(function, *args):
    """Other hooks on saved tensors lie over the checkpoint's."""

    def inside(*args):
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            return function(*args)

    return plain(inside, *args)


def nested(outer, inner):
    return lambda function, *args: outer(lambda *args: inner(function, *args), *args)


WAYS = {
    "plain": plain, "keep_routing": kept, "no early stop": to_the_end, "selective": saving, "other hooks": offloading,
    "plain in plain": nested(plain, plain), "plain in kept": nested(kept, plain), "kept in plain": nested(plain, kept),
    "three deep": nested(plain, nested(kept, plain)),
}  # fmt: skip


class Two(torch.nn.Module):
    """Two layers, the first of which is called twice; counts how often a router selects."""

    def __init__(self, router, way=None, **changes):
        super().__init__()
        self.way, self.selected = way or (lambda function, *args: function(*args)), 0
        self.layers = torch.nn.ModuleList(make(router, layer=i, seed=i, **changes) for i in range(2))
        for layer in self.layers:
            layer.router.select = self.counting(layer.router.select)

    def counting(self, select):
        def counted(*args):
            self.selected += 1
            return select(*args)

        return counted

    def forward(self, x, ctx):
        for index in (0, 1, 0):
            x = self.way(lambda x, index=index: x + self.layers[index](x, ctx)[0], x)
        return x


def busy(router):
    """Everything random or counted at once, as far as this router has it."""
    changes = {"expert_dropout": 0.25, "min_capacity": 0, "capacity_factor": 0.9}
    if router != "hash":
        changes |= {"jitter": 0.05}
    if router in ("switch", "gshard"):
        changes |= {"reroute": 1}
    if router not in ("hash", "dense", "expert_choice", "sinkhorn"):
        changes |= {"balance_loss": 0.5, "global_batch_loss": 0.5, "importance_loss": 0.5}
    return changes


def run(model, seed=0, retain=False):
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    tally = {}
    loss = model(x, context(TOKENS, seed=3, step=5, tally=tally, reducer=lambda s: 2 * s)).square().sum()
    loss.backward(retain_graph=retain)
    return loss, gradients(model) | {"x": x.grad.clone()}, tally


@pytest.mark.parametrize("router", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_recomputed_gradients_are_those_without_checkpointing_bit_for_bit(router, way):
    plain, checkpointed = Two(router, **busy(router)), Two(router, WAYS[way], **busy(router))
    _, expected, tally = run(plain)
    _, found, tally_found = run(checkpointed)
    assert_same(found, expected)
    assert plain.selected == checkpointed.selected == 3
    assert tally_found.keys() == tally.keys()
    assert all(torch.equal(tally_found[key], tally[key]) for key in tally)


def test_one_region_around_several_layers_keeps_the_order_of_their_decisions():
    _, expected, _ = run(Two("gshard", **busy("gshard")))
    model = Two("gshard", **busy("gshard"))
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for way in (plain, kept):
        model.zero_grad()
        x.grad = None
        ctx = context(TOKENS, seed=3, step=5, tally={}, reducer=lambda s: 2 * s)
        way(model, x, ctx).square().sum().backward()
        assert_same(gradients(model) | {"x": x.grad}, expected)


@pytest.mark.parametrize("way", ["plain", "keep_routing", "plain in plain"])
def test_a_graph_that_is_kept_may_be_walked_twice(way):
    model = Two("gshard", WAYS[way], **busy("gshard"))
    loss, once, _ = run(model, retain=True)
    loss.backward()
    assert_same(gradients(model), {name: 2 * grad for name, grad in once.items() if name != "x"})
    assert model.selected == 3


class Noting(LocalDispatcher):
    """Takes note of every decision that rows are sent by."""

    def __init__(self):
        self.seen = []

    def dispatch(self, x_TD, ids_TK, kept_TK, num_experts, key_TK=None):
        self.seen.append((ids_TK, kept_TK))
        return super().dispatch(x_TD, ids_TK, kept_TK, num_experts, key_TK)


@pytest.mark.parametrize("way", [plain, kept])
@pytest.mark.parametrize("router", LEARNED)
def test_a_router_that_would_choose_otherwise_by_now_is_not_asked(router, way):
    layer = make(router, capacity_factor=0.5, min_capacity=0)
    layer.dispatcher = Noting()
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    y = way(lambda x: layer(x)[0], x)
    layer.router.weight.data.neg_()
    y.sum().backward()
    layer(x)
    then, recomputed, now = layer.dispatcher.seen
    assert all(map(torch.equal, recomputed, then))
    assert router == "dense" or not all(map(torch.equal, now, then))


@pytest.mark.parametrize("way", [plain, kept])
def test_the_recomputation_uses_the_expert_that_was_asked(way):
    layer = make(experts=2, capacity_factor=None, balance_loss=0.0, z_loss=0.0)
    x = torch.ones(TOKENS, WIDTH)
    layer.router.weight.data[:] = torch.tensor([1.0, 1.0 - 1e-6])[:, None]
    y = way(lambda x: layer(x)[0], x)
    layer.router.weight.data[0] -= 1e-5
    assert (layer(x)[1].ids_TK == 1).all()
    y.sum().backward()
    assert layer.experts.w_out.grad[0].any()
    assert not layer.experts.w_out.grad[1].any()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("way", [plain, kept])
def test_two_forward_passes_in_flight_keep_apart(way, order):
    expected = [run(Two("gshard", **busy("gshard")), seed)[1] for seed in (1, 2)]
    model = Two("gshard", way, **busy("gshard"))
    inputs = [torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (1, 2)]
    contexts = [context(TOKENS, seed=3, step=5, tally={}, reducer=lambda s: 2 * s) for _ in inputs]
    losses = [model(x, ctx).square().sum() for x, ctx in zip(inputs, contexts, strict=True)]
    for index in order:
        model.zero_grad()
        losses[index].backward()
        assert_same(gradients(model) | {"x": inputs[index].grad}, expected[index])


def test_ranks_sum_once_though_the_layer_runs_twice():
    layer, calls = make("gshard", global_batch_loss=1.0), []

    def reducer(sums):
        calls.append(1)
        return sums

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    plain(lambda x: layer(x, context(TOKENS, reducer=reducer))[0], x).sum().backward()
    assert len(calls) == 1


def test_a_replayed_decision_is_recomputed_like_any_other():
    layer = make("gshard", global_batch_loss=1.0)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    decision, tally = layer(x.flip(0))[1].decision, {}
    ctx = context(TOKENS, replay={0: decision}, tally=tally)
    plain(lambda x: layer(x, ctx)[0], x).sum().backward()
    assert tally[0, "global_batch"][0, -1] == TOKENS


def test_backward_may_run_in_another_thread():
    _, expected, _ = run(Two("gshard", **busy("gshard")))
    for way in (plain, kept):
        model = Two("gshard", way, **busy("gshard"))
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
        ctx = context(TOKENS, seed=3, step=5, tally={}, reducer=lambda s: 2 * s)
        thread = threading.Thread(target=model(x, ctx).square().sum().backward)
        thread.start()
        thread.join()
        assert_same(gradients(model) | {"x": x.grad}, expected)


def test_reentrant_checkpointing_is_refused():
    model = Two("gshard", partial(checkpoint, use_reentrant=True))
    with pytest.raises(ConfigError, match=r"use_reentrant=False, context_fn=turnout\.moe\.keep_routing"):
        run(model)
    assert model.selected == 3


def test_a_torch_that_hides_its_regions_needs_the_public_interface(monkeypatch):
    monkeypatch.setattr(recompute, "_held", lambda function: {})
    with pytest.raises(ConfigError, match="keep_routing"):
        run(Two("gshard", plain))
    _, expected, _ = run(Two("gshard"))
    assert_same(run(Two("gshard", kept))[1], expected)


def test_a_recomputation_that_takes_another_way_is_refused():
    layers = [make(layer=i) for i in range(2)]
    calls = iter((0, 1))
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    y = plain(lambda x: layers[next(calls)](x)[0], x)
    with pytest.raises(ConfigError, match="same order"):
        y.sum().backward()


def test_nothing_is_kept_without_a_graph():
    layer, x = make(), torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        y = kept(lambda x: layer(x)[0], x)
    assert torch.equal(y, layer(x)[0])
    assert recompute._regions.stack == []
