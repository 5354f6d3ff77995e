"""Memory that nobody wrote is read by nobody: fresh tensors full of NaN change no result."""

from contextlib import contextmanager

import pytest
import torch

from turnout import kernels
from turnout.tests.moe.layers.making import NAMES, context, gradients, make


@contextmanager
def poisoned():
    """torch fills every fresh buffer with NaN (or the largest integer) instead of what was there."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(form, dtype, x, make_layer):
    layer, x = make_layer().to(dtype), x.to(dtype, copy=True).requires_grad_()
    with kernels.using(form):
        y, routing = layer(x, context(len(x)))
        y.square().sum().backward()
    return [y, x.grad, *gradients(layer).values(), *routing.aux.values(), routing.ids_TK, routing.kept_TK]


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("router", NAMES)
@pytest.mark.parametrize("case", ["usual", "drops", "no token", "one hot expert", "bfloat16"])
def test_fresh_memory_is_never_read(case, router, form):
    changes = {"capacity_factor": 0.4, "min_capacity": 0} if case == "drops" else {"capacity_factor": 1.5}
    x = torch.rand(0 if case == "no token" else 23, 16)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32

    def make_layer():
        layer = make(router, experts=8, expert_dropout=0.2, shared_experts=1, shared_gate=True, **changes)
        if case == "one hot expert" and router != "hash":
            layer.router.weight.data[3] = 5 * layer.router.weight.data.abs().max()
        return layer

    expected = results(form, dtype, x, make_layer)
    with poisoned():
        found = results(form, dtype, x, make_layer)
    assert all(tensor.isfinite().all() for tensor in expected)
    assert all(map(torch.equal, found, expected))


def test_the_poison_would_be_seen():
    with poisoned():
        assert (torch.empty(4, 4) @ torch.ones(4, 4)).isnan().all()
        assert torch.zeros(4).new_empty(2).isnan().all()
