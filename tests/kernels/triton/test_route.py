"""Sort, permute and combine in Triton against the references, bit by bit where sums have one order."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import combine, permute, registry, sort_by_expert
from turnout.kernels.triton.route import route

# tokens, choices, experts, share kept
GRID = [(0, 2, 4, 1), (1, 1, 1, 1), (7, 3, 3, 0), (33, 2, 8, 0.6), (65, 4, 60, 0.9), (70, 1, 512, 1)]
QUICK = GRID[3]


def assignments(T, K, E, share):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.empty(0, K, dtype=torch.int64)
    kept = torch.rand(T, K) < share
    return ids.masked_fill(~kept, -999), kept


def check_sort(ids, kept, E):
    with kernels.using("triton"):
        assert registry.choose("sort_by_expert", ids, kept, E) == "triton"
        got = sort_by_expert(ids, kept, E)
    with kernels.using("reference"):
        wanted = sort_by_expert(ids, kept, E)
    for value, truth in zip(got, wanted, strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)


def check_sums(T, K, E, share, D, dtype):
    ids, kept = assignments(T, K, E, share)
    order, slot, _ = sort_by_expert(ids, kept, E)
    x, weights = torch.randn(T, D).to(dtype).requires_grad_(), torch.rand(T, K).requires_grad_()
    y, grad = torch.randn(len(order), D).to(dtype).requires_grad_(), torch.randn(T, D).to(dtype)
    results = []
    for form in ("triton", "torch"):
        with kernels.using(form):
            assert {
                registry.choose("permute", x, order, slot),
                registry.choose("combine", y, weights, order, slot),
            } == {form}
            rows, out = permute(x, order, slot), combine(y, weights, order, slot)
        (grad_x,) = torch.autograd.grad(rows, x, rows.detach())
        results.append((rows, out, grad_x, *torch.autograd.grad(out, (y, weights), grad)))
    *same, (dots, exact) = zip(*results, strict=True)
    assert all(value.dtype == truth.dtype and torch.equal(value, truth) for value, truth in same)
    torch.testing.assert_close(dots, exact, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_sorting_equals_the_reference():
    check_sort(*assignments(*QUICK[:3], QUICK[3]), QUICK[2])


def test_nothing_is_dropped_when_no_mask_is_given():
    ids = torch.randint(0, 5, (20, 4))
    routing = route(ids, None, 5)
    order, slot, counts = sort_by_expert(ids, torch.ones_like(ids, dtype=torch.bool), 5)
    assert torch.equal(routing.order_P, order.int())
    assert torch.equal(routing.slot_TK, slot.int())
    assert torch.equal(routing.ends_E, counts.cumsum(0).int())


def test_permute_and_combine_have_the_library_forms_bits():
    check_sums(*QUICK, D=40, dtype=torch.bfloat16)


def test_poison_of_other_rows_does_not_reach_a_dropped_token():
    slot, order = torch.tensor([[0], [-1]]), torch.tensor([0])
    y, weights = torch.full((1, 3), torch.nan, requires_grad=True), torch.full((2, 1), torch.nan, requires_grad=True)
    with kernels.using("triton"):
        out = combine(y, weights, order, slot)
    assert (out[1] == 0).all()
    assert torch.autograd.grad(out, weights, torch.ones(2, 3))[0][1] == 0


@pytest.mark.full
@pytest.mark.parametrize("case", GRID)
def test_sort_grid(case):
    check_sort(*assignments(*case), case[2])
    hot = torch.zeros(case[0], case[1], dtype=torch.int64)
    check_sort(hot, torch.ones_like(hot, dtype=torch.bool), case[2])


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [1, 15, 17, 1030])
@pytest.mark.parametrize("case", GRID[:4])
def test_sum_grid(case, D, dtype):
    check_sums(*case, D=D, dtype=dtype)
