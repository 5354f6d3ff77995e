"""Sort, permute and combine against loops over assignments in Python."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from turnout import kernels
from turnout.kernels import combine, permute, sort_by_expert

# tokens, choices, experts, share kept
GRID = [(0, 2, 4, 1), (1, 1, 1, 1), (1, 2, 8, 0), (7, 3, 3, 1), (33, 2, 8, 0.6), (20, 1, 512, 0.9), (64, 4, 5, 0.5)]


def assignments(T, K, E, share):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.empty(0, K, dtype=torch.int64)
    return ids, torch.rand(T, K) < share


def sort_in_python(ids, kept, num_experts):
    flat = [
        (expert, i)
        for i, (expert, k) in enumerate(zip(ids.flatten().tolist(), kept.flatten().tolist(), strict=True))
        if k
    ]
    order = [i for _, i in sorted(flat)]
    slots = [order.index(i) if i in order else -1 for i in range(ids.numel())]
    counts = [sum(expert == e for expert, _ in flat) for e in range(num_experts)]
    return order, slots, counts


@pytest.mark.parametrize(("T", "K", "E", "share"), GRID)
def test_rows_are_sorted_by_expert_then_token_then_choice(form, T, K, E, share):
    ids, kept = assignments(T, K, E, share)
    order, slot, counts = sort_by_expert(ids, kept, E)
    assert (order.tolist(), slot.flatten().tolist(), counts.tolist()) == sort_in_python(ids, kept, E)
    assert slot.shape == (T, K)
    assert {order.dtype, slot.dtype, counts.dtype} == {torch.int64}


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.integers(1, 9).flatmap(
        lambda E: st.tuples(
            st.just(E),
            st.integers(1, 4).flatmap(
                lambda K: st.lists(
                    st.lists(st.tuples(st.integers(0, E - 1), st.booleans()), min_size=K, max_size=K), max_size=12
                )
            ),
        )
    )
)
def test_any_assignment_is_sorted_alike_in_both_forms(case):
    E, tokens = case
    table = (
        torch.tensor(tokens, dtype=torch.int64).reshape(len(tokens), -1, 2) if tokens else torch.empty(0, 2, 2).long()
    )
    ids, kept = table[..., 0], table[..., 1].bool()
    for form in ("reference", "torch"):
        with kernels.using(form):
            order, slot, counts = sort_by_expert(ids, kept, E)
        assert (order.tolist(), slot.flatten().tolist(), counts.tolist()) == sort_in_python(ids, kept, E)


def test_ids_of_dropped_assignments_are_not_read(form):
    ids, kept = torch.tensor([[0, 99], [-7, 1]]), torch.tensor([[True, False], [False, True]])
    order, slot, counts = sort_by_expert(ids, kept, 2)
    assert (order.tolist(), slot.tolist(), counts.tolist()) == ([0, 3], [[0, -1], [-1, 1]], [1, 1])


@pytest.mark.parametrize(("T", "K", "E", "share"), GRID)
def test_permute_fetches_rows_and_combine_adds_them_up(form, T, K, E, share):
    ids, kept = assignments(T, K, E, share)
    order, slot, _ = sort_by_expert(ids, kept, E)
    x, weights = torch.randn(T, 5), torch.rand(T, K)
    rows = permute(x, order, slot)
    assert torch.equal(rows, torch.stack([x[i // K] for i in order]) if len(order) else torch.empty(0, 5))
    out = combine(rows * 2, weights, order, slot)
    truth = (weights.double() * kept).sum(1, keepdim=True) * 2 * x.double()
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("T", "K", "E", "share"), GRID)
def test_gradients_are_those_of_dense_float64_sums(form, T, K, E, share):
    ids, kept = assignments(T, K, E, share)
    order, slot, _ = sort_by_expert(ids, kept, E)
    x, weights = torch.randn(T, 5).requires_grad_(), torch.rand(T, K).requires_grad_()
    grad = torch.randn(T, 5)
    got = torch.autograd.grad(combine(permute(x, order, slot).square(), weights, order, slot), (x, weights), grad)
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    dense = torch.einsum("tk,tk,td->td", w64, kept.double(), x64.square())
    truths = torch.autograd.grad(dense, (x64, w64), grad.double())
    for value, truth in zip(got, truths, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_narrow_rows_have_gradients_that_are_rounded_once(form, dtype, bound):
    ids, kept = assignments(9, 3, 4, 0.7)
    order, slot, _ = sort_by_expert(ids, kept, 4)
    y, weights = torch.randn(len(order), 37).to(dtype).requires_grad_(), torch.rand(9, 3).requires_grad_()
    grad = torch.randn(9, 37).to(dtype)
    of_y, of_weights = torch.autograd.grad(combine(y, weights, order, slot), (y, weights), grad)
    g64 = grad.double()[order // 3]
    assert (
        of_y.double() - g64 * weights.detach().double().flatten()[order, None]
    ).abs().max() <= bound * g64.abs().max()
    truth = torch.zeros(27, dtype=torch.float64)
    truth[order] = (g64 * y.detach().double()).sum(1)
    torch.testing.assert_close(of_weights.double().flatten(), truth, rtol=1e-5, atol=1e-5)


def test_gradcheck(form):
    ids, kept = assignments(5, 2, 3, 0.7)
    order, slot, _ = sort_by_expert(ids, kept, 3)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(order), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, order, slot), (x,))
    assert torch.autograd.gradcheck(lambda y, w: combine(y, w, order, slot), (y, weights))


def test_half_precision_sums_are_float32_in_choice_order(form):
    order, slot = torch.arange(4), torch.arange(4)[None]
    y = torch.tensor(
        [[1.0], [2.0**-9], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16
    )  # each too small to move a bfloat16 1
    out = combine(y, torch.ones(1, 4), order, slot)
    assert out.dtype == torch.bfloat16
    assert out.item() == torch.tensor(1 + 3 * 2.0**-9).bfloat16().item() > 1
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(permute(x, order, slot), x, y)
    assert grad.item() == out.item()
    big = torch.tensor([[1.0], [2.0**25], [-(2.0**25)], [1.0]])  # (1 + 2²⁵) - 2²⁵ + 1 is 1 in this order only
    assert combine(big, torch.ones(1, 4), order, slot).item() == 1.0


def test_nan_in_other_tokens_rows_does_not_reach_a_dropped_token(form):
    ids, kept = torch.tensor([[0], [0]]), torch.tensor([[True], [False]])
    order, slot, _ = sort_by_expert(ids, kept, 1)
    y = torch.full((1, 3), float("nan"), requires_grad=True)
    x = torch.zeros(2, 3, requires_grad=True)
    out = combine(y, torch.ones(2, 1), order, slot)
    assert out[0].isnan().all()
    assert (out[1] == 0).all()
    (grad,) = torch.autograd.grad(permute(x, order, slot), x, torch.full((1, 3), float("nan")))
    assert (grad[1] == 0).all()


def test_two_runs_give_the_same_bits(form):
    ids, kept = assignments(200, 4, 8, 0.8)
    order, slot, _ = sort_by_expert(ids, kept, 8)
    x, weights = torch.randn(200, 16).bfloat16().requires_grad_(), torch.rand(200, 4).requires_grad_()

    def run():
        out = combine(permute(x, order, slot).square(), weights, order, slot)
        return out, *torch.autograd.grad(out.float().square().sum(), (x, weights))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
