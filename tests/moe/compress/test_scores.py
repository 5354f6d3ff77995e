"""Pruning by scores: exactly as many zeros as asked, the lowest ones, ties by place."""

import pytest
import torch

from turnout.moe.compress.scores import global_shares, lowest, magnitude, wanda, weakest
from turnout.moe.compress.seen import Seen
from turnout.moe.compress.sparsity import Sparsity


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_magnitude_zeroes_the_smallest_and_no_others(share, dtype):
    w = drawn(24, 40, dtype=dtype)
    new = magnitude(w, Sparsity(share=share))
    order = w.abs().flatten().argsort(stable=True)  # bfloat16 has ties
    wanted = w.flatten().index_fill(0, order[: round(share * 960)], 0).view_as(w)
    assert torch.equal(new, wanted)


def test_each_matrix_of_a_stack_has_its_share():
    stack = drawn(3, 8, 12) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    new = magnitude(stack, Sparsity(share=0.25))
    assert torch.equal(new, torch.stack([magnitude(w, Sparsity(share=0.25)) for w in stack]))
    assert ((new == 0).sum((1, 2)) == 24).all()


@pytest.mark.parametrize(("share", "span"), [(0.5, 4), (0.75, 4), (0.5, 8), (1 / 3, 3), (0.5, 2)])
def test_every_span_along_the_input_width_loses_exactly_its_share_of_smallest(share, span):
    w = drawn(10, 24)
    gone = weakest(w.abs(), Sparsity(share=share, span=span)).unflatten(1, (-1, span))
    assert (gone.sum(-1) == round(share * span)).all()
    parts = w.abs().unflatten(1, (-1, span))
    assert (parts.masked_fill(~gone, -1).amax(-1) <= parts.masked_fill(gone, torch.inf).amin(-1)).all()


def test_of_equal_scores_the_first_go():
    assert weakest(torch.ones(2, 8), Sparsity(span=4)).tolist() == [[True, True, False, False] * 2] * 2
    assert lowest(torch.tensor([2.0, 1.0, 2.0, 0.0, 2.0]), 3).tolist() == [True, True, False, True, False]
    assert weakest(torch.zeros(2, 3), Sparsity(share=0.5)).tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("span", [None, 4])
def test_wanda_compares_weights_times_norms_within_a_row(span):
    w, x = drawn(6, 16), drawn(50, 16, seed=1) * torch.arange(16)
    seen = Seen.nothing(16, gram=False)
    seen.add(x)
    new, score = wanda(w, seen, Sparsity(span=span)), w.abs() * x.norm(dim=0)
    for row in range(6):
        for part in range(0, 16, span or 16):
            end = part + (span or 16)
            order = score[row, part:end].argsort(stable=True)
            assert sorted(order[: (end - part) // 2].tolist()) == (new[row, part:end] == 0).nonzero().flatten().tolist()
    assert torch.equal(new[new != 0], w[new != 0])
    assert (new[:, 0] == 0).all()  # a dead column goes first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_one_threshold_over_all_matrices_is_that_of_sorting_them_together(share, dtype):
    model = {"a": drawn(20, 30, dtype=dtype), "b": 3 * drawn(4, 9, 7, dtype=dtype, seed=1), "c": torch.zeros(5, 5)}
    shares = global_shares(lambda: iter(model.items()), share)
    pruned = [magnitude(w.flatten()[None], Sparsity(share=shares[name]))[0] for name, w in model.items()]
    whole = torch.cat([w.float().flatten() for w in model.values()])
    order = whole.abs().argsort(stable=True)
    assert torch.equal(
        torch.cat([w.float() for w in pruned]), whole.index_fill(0, order[: round(share * len(whole))], 0)
    )


def test_one_threshold_finds_weights_that_differ_in_their_last_bit():
    w = torch.nextafter(torch.ones(1), torch.tensor(2.0)).expand(6).clone()
    w[4] = 1.0
    assert global_shares(lambda: [("w", w[None])], 1 / 6) == {"w": 1 / 6}
    assert global_shares(lambda: [("a", w[None, :4]), ("b", w[None, 4:])], 3 / 6) == {"a": 2 / 4, "b": 1 / 2}
