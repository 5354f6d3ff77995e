"""Zeros and rounding in one pass against the recursion of SparseGPT's tests, which rounds on the way, in float64."""

from dataclasses import replace

import pytest
import torch

from turnout.kernels.quantized import nearest
from turnout.moe.compress.clipping import MAXIMUM, ScaleRule, fit_scale
from turnout.moe.compress.joint import prune_and_round
from turnout.moe.compress.pruning import prune
from turnout.moe.compress.rounding import round_weight
from turnout.moe.compress.scores import magnitude
from turnout.moe.compress.sparsity import Sparsity
from turnout.moe.quantization_config import QuantizationConfig
from turnout.tests.moe.compress.test_sparsegpt import reference, rows_of, seen_of, weight

INT4 = QuantizationConfig(bits=4, group=64)
WAYS = [(QuantizationConfig(), 150), (QuantizationConfig(zero=True), 150), (INT4, 192), (replace(INT4, zero=True), 128),
        (replace(INT4, group=128), 256)]  # fmt: skip
SPARSE = [Sparsity(), Sparsity(span=2), Sparsity(share=0.0)]


def rounder(cfg, seen, rule=MAXIMUM):
    """A group's scale when its first column comes, of a row's all, from the matrix as it is then."""
    scales = {}

    def rounded(matrix, at):
        size = cfg.group or matrix.shape[1]
        if at % size == 0:
            span = slice(at, at + size)
            scales["now"] = fit_scale(matrix[:, span], cfg, rule, seen.square_D[span])
        scale, zero = (x.flatten().double() if x.numel() else None for x in scales["now"])
        q = nearest(matrix[:, at], scale, zero, cfg.bits, cfg.kind)
        return scale * (q if zero is None else q - zero)

    return rounded


@pytest.mark.parametrize("sparsity", SPARSE, ids=str)
@pytest.mark.parametrize(("cfg", "width"), WAYS, ids=str)
def test_zeros_and_numbers_are_those_of_one_pass_in_float64(cfg, width, sparsity):
    w, seen = weight(8, width), seen_of(rows_of(2 * width, width))
    stored, made = prune_and_round(w, seen, sparsity, cfg, name="w")
    wanted = reference(w, seen.gram_DD, sparsity, 0.01, rounder(cfg, seen))
    found = stored.dequantized().double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert made.sparsity == float((wanted == 0).double().mean()) >= sparsity.share
    if sparsity.span is not None:
        assert ((found == 0).unflatten(1, (-1, sparsity.span)).sum(-1) >= 1).all()
    off = w - found
    assert made.error == pytest.approx(float(((off @ seen.gram_DD) * off).sum()), rel=1e-3)


def test_calibration_weighs_each_groups_errors_by_its_own_channels():
    w, seen, rule = weight(8, 192), seen_of(rows_of(400, 192) * torch.logspace(-1, 1, 192)), ScaleRule(clip="mse")
    stored, _ = prune_and_round(w, seen, Sparsity(), INT4, rule, name="w")
    wanted = reference(w, seen.gram_DD, Sparsity(), 0.01, rounder(INT4, seen, rule))
    torch.testing.assert_close(stored.dequantized().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity", [Sparsity(share=0.3), Sparsity(share=0.25, span=4)], ids=str)
def test_one_pass_is_nearer_than_zeros_first_and_rounding_after(sparsity):
    w, seen = weight(64, 128).float(), seen_of(rows_of(300, 128))
    _, made = prune_and_round(w, seen, sparsity, INT4, name="w")
    zeros, _ = prune(w, seen, sparsity, "sparsegpt", name="w")
    off = w.double() - round_weight(zeros, INT4, name="w").dequantized().double()
    assert made.error < 0.9 * float(((off @ seen.gram_DD) * off).sum())


def test_one_scale_for_the_matrix_is_one():
    rule = ScaleRule(whole=True)
    stored, _ = prune_and_round(weight(6, 128), seen_of(rows_of(200, 128)), Sparsity(), INT4, rule, name="w")
    assert stored.scale.shape == (6, 2)
    assert stored.scale.unique().numel() == 1


def test_where_calibration_can_not_decide_magnitudes_do_and_the_rest_is_rounded_to_nearest():
    w, seen = weight(6, 64).float(), seen_of(rows_of(3, 64))
    stored, made = prune_and_round(w, seen, Sparsity(), INT4, name="w", min_rows=5)
    assert made.fallback == "saw 3 rows, fewer than 5"
    assert torch.equal(stored.q, round_weight(magnitude(w, Sparsity()), INT4, name="w").q)
