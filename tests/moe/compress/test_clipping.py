"""How much of a range is kept: by the maximum, by a percentile, where the squared error is least."""

import pytest
import torch

from turnout.kernels.quantized import encode
from turnout.moe.compress import clipping
from turnout.moe.compress.clipping import SHARES, ScaleRule, fit_scale
from turnout.moe.quantization_config import QuantizationConfig

INT8 = QuantizationConfig()
INT4 = QuantizationConfig(bits=4, group=64)
WAYS = [INT8, QuantizationConfig(zero=True), QuantizationConfig(kind="float"), INT4,
        QuantizationConfig(bits=4, group=64, zero=True), QuantizationConfig(group=128)]  # fmt: skip


def weight(rows=6, depth=256, seed=0):
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed))


def loss(w, found, cfg, square=None):
    made = encode(w, *found, cfg.bits, kind=cfg.kind).dequantized()
    return ((made - w).square() * (1 if square is None else square)).sum()


def test_a_percentile_is_the_magnitude_of_that_rank():
    w = weight(depth=1000)
    scale, zero = fit_scale(w, INT8, ScaleRule(clip="percentile", percentile=99))
    assert zero.numel() == 0
    torch.testing.assert_close(scale * 127, w.abs().sort(-1).values[:, 989])
    groups, _ = fit_scale(weight(), INT4, ScaleRule(clip="percentile", percentile=90))
    torch.testing.assert_close(groups * 7, weight().unflatten(-1, (4, 64)).abs().sort(-1).values[..., 57])
    sparse = torch.zeros(1, 64).index_fill(1, torch.tensor([3]), 2.0)
    assert fit_scale(sparse, INT8, ScaleRule(clip="percentile", percentile=50))[0] == 2 / 127, "nothing to keep but it"


@pytest.mark.parametrize("cfg", WAYS)
def test_the_search_finds_each_rows_or_groups_own_least(cfg):
    w = weight() * torch.logspace(-2, 1, 6)[:, None]
    every = [fit_scale(w, cfg, ScaleRule())]
    every = [(every[0][0] * share, every[0][1]) for share in SHARES] if not cfg.zero else every
    found = fit_scale(w, cfg, ScaleRule(clip="mse"))
    assert all(loss(w, found, cfg) <= loss(w, one, cfg) * (1 + 1e-5) for one in every)
    assert cfg.bits == 8 or loss(w, found, cfg) < loss(w, every[0], cfg), "four bits are worth clipping"


def test_calibration_says_whose_errors_count():
    w = weight()
    w[:, 5] = 9.0
    square = torch.ones(256).index_fill(0, torch.tensor([5]), 1e4)
    alone, weighed = (fit_scale(w, INT4, ScaleRule(clip="mse"), s) for s in (None, square))
    assert loss(w, weighed, INT4, square) < loss(w, alone, INT4, square)
    assert (weighed[0][:, 0] > alone[0][:, 0]).all(), "the large weight matters now"
    assert torch.equal(weighed[0][:, 1:], alone[0][:, 1:])


def test_one_scale_for_a_matrix_weighs_the_errors_of_every_row():
    w, square = weight(), torch.ones(256).index_fill(0, torch.tensor([5]), 1e4)
    w[:, 5] = 3.0
    whole, none = fit_scale(w, INT4, ScaleRule(whole=True))
    found = loss(w, fit_scale(w, INT4, ScaleRule(clip="mse", whole=True), square), INT4, square)
    assert found <= min(loss(w, (whole * share, none), INT4, square) for share in SHARES) * (1 + 1e-5)


def test_a_matrix_is_searched_in_pieces_with_the_same_result(monkeypatch):
    w, rule = weight(rows=9), ScaleRule(clip="mse")
    expected = fit_scale(w, INT4, rule)[0]
    monkeypatch.setattr(clipping, "PIECE", 512)
    assert torch.equal(fit_scale(w, INT4, rule)[0], expected)


@pytest.mark.parametrize("cfg", [INT8, INT4, QuantizationConfig(zero=True)])
@pytest.mark.parametrize("clip", ["max", "percentile", "mse"])
def test_a_whole_matrix_may_share_one_scale(cfg, clip):
    w = weight()
    scale, zero = fit_scale(w, cfg, ScaleRule(clip=clip, whole=True))
    assert scale.shape == ((6,) if cfg.group is None else (6, 4))
    assert (scale == scale.flatten()[0]).all()
    if clip == "max" and not cfg.zero:
        torch.testing.assert_close(scale.flatten()[0], w.abs().max() / (2 ** (cfg.bits - 1) - 1))
    assert zero.numel() in (0, scale.numel())
    assert encode(w, scale, zero, cfg.bits).dequantized().isfinite().all()
