"""The loss behind the head in Triton, in chunks, against float64."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry
from turnout.kernels.triton import heads

BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def check(T, V, D, dtype, own=None, even=False):
    """`own`: the weight's dtype. A gradient that differs from token to token, some tokens that do not count."""
    x, w = torch.randn(T, D).to(dtype).requires_grad_(), (torch.randn(V, D) / D**0.5).to(own or dtype).requires_grad_()
    targets = torch.randint(0, V, (T,))
    targets[1::3] = -100
    grad = torch.ones(T) if even else torch.randn(T)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    with kernels.using("triton"):
        assert registry.choose("linear_cross_entropy", x, w, targets) == "triton"
        losses = kernels.linear_cross_entropy(x, w, targets)
    with kernels.using("reference"):
        truth = kernels.linear_cross_entropy(*exact, targets)
    found = (losses, *torch.autograd.grad(losses, (x, w), grad, retain_graph=True))
    wanted = (truth, *torch.autograd.grad(truth, exact, grad.double()))
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert not one.isnan().any()
        assert (one.double() - other).norm() <= BOUND[dtype] * other.norm()
    assert losses.dtype == torch.float32
    assert not losses[targets < 0].any()
    assert found[2].dtype == w.dtype
    again = torch.autograd.grad(losses, (x, w), grad)
    assert all(map(torch.equal, again, found[1:]))


@pytest.fixture
def _short(monkeypatch):
    monkeypatch.setattr(heads, "CHUNK", 1)
    monkeypatch.setattr(heads, "FEWEST", 4)


@pytest.mark.usefixtures("_short")
def test_chunks_give_the_loss_and_its_gradients():
    check(9, 21, 12, torch.bfloat16)
    check(9, 21, 12, torch.bfloat16, own=torch.float32)


@pytest.mark.usefixtures("_short")
def test_nothing_of_the_size_of_logits_is_kept():
    x, w = torch.randn(9, 6, requires_grad=True), torch.randn(70, 6, requires_grad=True)
    kept = []
    with kernels.using("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        kernels.linear_cross_entropy(x, w, torch.zeros(9, dtype=torch.int64))
    assert max(kept) == w.numel() < 9 * 70


@pytest.mark.full
@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("T", "V", "D"), [(0, 5, 4), (1, 1, 1), (4, 17, 3), (5, 1025, 16), (13, 64, 33)])
def test_grid(T, V, D, dtype):
    check(T, V, D, dtype)
    check(T, V, D, dtype, own=torch.float32, even=True)


@pytest.mark.full
def test_one_chunk_of_many_logits():
    check(3, 10_000, 8, torch.float32)
