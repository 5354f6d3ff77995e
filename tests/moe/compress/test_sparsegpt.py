"""SparseGPT against the paper's recursion written out: at each column the rest of the Hessian is inverted afresh."""

import pytest
import torch

from turnout.moe.compress.pruning import prune
from turnout.moe.compress.scores import magnitude
from turnout.moe.compress.seen import Seen
from turnout.moe.compress.sparsegpt import inverse_root, sparsegpt
from turnout.moe.compress.sparsity import Sparsity


def rows_of(count, width, seed=0):
    """Rows whose channels go together, as those of trained models do."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=draw, dtype=torch.float64)
    return mixed @ torch.randn(width, width, generator=draw, dtype=torch.float64)


def seen_of(x_TD):
    return Seen(len(x_TD), x_TD.abs().amax(0), x_TD.square().sum(0), x_TD.mT @ x_TD)


def weight(rows, width, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(w, gram, sparsity, damp, rounded=lambda matrix, at: matrix[:, at]):
    """Column by column: H⁻¹ of the columns from c on is computed afresh, and every later column updated at once."""
    w, (rows, width) = w.clone(), w.shape
    h = gram + damp * gram.diagonal().mean() * torch.eye(width, dtype=w.dtype)
    left = [torch.linalg.inv(h[c:, c:]) for c in range(width)]
    span, gone = sparsity.span or 128, 0
    for c in range(width):
        if c % span == 0:
            end = min(c + span, width)
            score = torch.stack([w[:, j] ** 2 / left[j][0, 0] for j in range(c, end)], 1)
            if sparsity.span is None:
                count = round(sparsity.share * rows * end) - gone
                order = score.flatten().argsort(stable=True)
                mask = torch.zeros(score.numel(), dtype=torch.bool).index_fill(0, order[:count], True).view_as(score)
                gone += count
            else:
                order = score.argsort(dim=-1, stable=True)[:, : round(sparsity.share * span)]
                mask = torch.zeros_like(score, dtype=torch.bool).scatter(1, order, True)
        kept = torch.where(mask[:, c % span], 0, rounded(w, c))
        error = (w[:, c] - kept) / left[c][0, 0]
        w[:, c + 1 :] -= error[:, None] * left[c][0, 1:]
        w[:, c] = kept
    return w


@pytest.mark.parametrize("width", [7, 128, 200, 256])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_zeros_anywhere_are_the_papers(width, share):
    w, seen = weight(12, width), seen_of(rows_of(300, width))
    sparsity = Sparsity(share=share)
    found, wanted = sparsegpt(w, seen, sparsity, 0.01), reference(w, seen.gram_DD, sparsity, 0.01)
    assert torch.equal(found == 0, wanted == 0)
    assert (found - wanted).abs().max() < 1e-8
    assert int((found == 0).sum()) == round(share * w.numel())


@pytest.mark.parametrize(("share", "span"), [(0.5, 4), (0.5, 8), (1 / 3, 3), (0.75, 4), (0.5, 150)])
def test_zeros_of_spans_are_the_papers(share, span):
    w, sparsity = weight(12, 300 if span in (3, 150) else 136), Sparsity(share=share, span=span)
    seen = seen_of(rows_of(400, w.shape[1]))
    found, wanted = sparsegpt(w, seen, sparsity, 0.01), reference(w, seen.gram_DD, sparsity, 0.01)
    assert torch.equal(found == 0, wanted == 0)
    assert (found - wanted).abs().max() < 1e-8
    assert ((found == 0).unflatten(1, (-1, span)).sum(-1) == round(share * span)).all()


def test_kept_weights_can_be_rounded_on_the_way_and_the_rest_makes_up_for_that_too():
    w, seen, sparsity = weight(16, 160), seen_of(rows_of(300, 160)), Sparsity(share=0.5)
    step = w.abs().amax(1) / 7

    def rounded(matrix, at):
        return (matrix[:, at] / step).round().clamp(-7, 7) * step

    def error(new):
        return ((w - new) @ seen.gram_DD * (w - new)).sum()

    found = sparsegpt(w, seen, sparsity, 0.01, rounded)
    assert (found - reference(w, seen.gram_DD, sparsity, 0.01, rounded)).abs().max() < 1e-8
    assert torch.allclose(found / step[:, None], (found / step[:, None]).round(), atol=1e-9)
    after = sparsegpt(w, seen, sparsity, 0.01)
    after = torch.stack([rounded(after, at) for at in range(160)], 1)
    assert error(found) < error(after)


def test_the_root_is_the_inverse_hessians_and_of_every_rest():
    x_TD = rows_of(60, 20)
    u, h = inverse_root(x_TD.mT @ x_TD, 0.1), x_TD.mT @ x_TD
    h = h + 0.1 * h.diagonal().mean() * torch.eye(20, dtype=h.dtype)
    assert torch.equal(u, u.triu())
    for c in (0, 7, 19):
        assert torch.allclose(u[c:, c:].mT @ u[c:, c:], torch.linalg.inv(h[c:, c:]), atol=1e-12)


def test_no_zeros_change_no_weight():
    w = weight(5, 140)
    assert torch.equal(sparsegpt(w, seen_of(rows_of(200, 140)), Sparsity(share=0.0)), w)


def test_dead_columns_and_fewer_rows_than_columns_are_ordinary():
    w, x_TD = weight(9, 96), rows_of(20, 96)
    x_TD[:, 3], x_TD[:, 40:50] = 0, 0
    seen = seen_of(x_TD)
    new, made = prune(w, seen, Sparsity(), "sparsegpt", name="w")
    assert (new - reference(w, seen.gram_DD, Sparsity(), 0.01)).abs().max() < 1e-8
    assert made.fallback is None
    assert made.sparsity == 0.5
    kept = new[:, 40:50] != 0
    assert torch.equal(new[:, 40:50][kept], w[:, 40:50][kept])  # nothing is made up for where nothing was seen
    assert kept.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_keeps_its_dtype_and_loses_less_than_by_magnitudes(dtype):
    w, x_TD = weight(32, 256).to(dtype), rows_of(600, 256).float()
    seen = Seen.nothing(256, gram=True)
    seen.add(x_TD)
    for sparsity in (Sparsity(), Sparsity(span=4)):
        errors = {}
        for method in ("magnitude", "wanda", "sparsegpt"):
            new, made = prune(w, seen, sparsity, method, name="w")
            assert new.dtype == dtype
            assert made.sparsity == 0.5
            lost = ((w.float() - new.float()) @ x_TD.mT).square().sum()
            assert made.error == pytest.approx(float(lost), rel=1e-3)
            errors[method] = made.error / made.energy
        assert errors["sparsegpt"] < 0.8 * errors["magnitude"]
        assert errors["sparsegpt"] < 0.8 * errors["wanda"]


def test_a_hessian_that_is_singular_leaves_the_choice_to_magnitudes_and_says_so():
    w, seen = weight(6, 40), seen_of(rows_of(10, 40))
    seen.gram_DD[7], seen.gram_DD[:, 7] = 0, 0
    new, made = prune(w, seen, Sparsity(), "sparsegpt", name="w", damp=0.0)
    assert made.fallback == "its Hessian is not positive definite"
    assert torch.equal(new, magnitude(w, Sparsity()))
