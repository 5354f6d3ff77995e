"""Rounding to nearest: the course's formula, its granularities, and what has no range or is not finite."""

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.moe.compress.clipping import ScaleRule
from turnout.moe.compress.rounding import round_weight
from turnout.moe.compress.seen import Seen
from turnout.moe.quantization_config import QuantizationConfig

WAYS = [QuantizationConfig(), QuantizationConfig(zero=True), QuantizationConfig(kind="float"),
        QuantizationConfig(group=64), QuantizationConfig(bits=4, group=64),
        QuantizationConfig(bits=4, group=64, zero=True)]  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_symmetric_rounding_is_the_formula(bits):
    cfg = QuantizationConfig(bits=bits, group=None if bits == 8 else 64)
    w = torch.randn(5, 128)
    made = round_weight(w, cfg, name="w")
    w_FGg = w.unflatten(-1, (-1, cfg.group or 128))
    s = (2 ** (bits - 1) - 1) / w_FGg.abs().amax(-1, keepdim=True)  # the course: q = round(s · w), w ≈ q / s
    torch.testing.assert_close(made.dequantized(), ((s * w_FGg).round() / s).flatten(1))
    assert made.rows == "float"
    assert made.bits == bits


@pytest.mark.parametrize("cfg", WAYS)
@pytest.mark.parametrize("clip", ["max", "percentile", "mse"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_has_no_range_is_exact(cfg, clip, whole):
    rule, zeros = ScaleRule(clip=clip, whole=whole), torch.zeros(3, 128)
    assert torch.equal(round_weight(zeros, cfg, rule, name="w").dequantized(), zeros)
    for value in (0.3, -0.3):
        w = torch.full((3, 128), value)
        torch.testing.assert_close(round_weight(w, cfg, rule, name="w").dequantized(), w, rtol=1e-6, atol=0)
    w = torch.randn(3, 128)
    w[1], w[:, 7], w[2, :64] = 0, 0, 0
    made = round_weight(w, cfg, rule, name="w").dequantized()
    assert (made[w == 0] == 0).all(), "a zero stays one"
    assert made.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_points_use_the_range_of_numbers_that_lie_on_one_side(bits):
    w = torch.rand(4, 128) + 1
    plain, moved = (
        round_weight(w, QuantizationConfig(bits=bits, group=64, zero=zero), name="w").dequantized()
        for zero in (False, True)
    )
    assert (moved - w).square().mean() < (plain - w).square().mean() / 3


def test_e4m3_reaches_448_and_keeps_three_bits_after_the_first():
    w = torch.randn(4, 96)
    made = round_weight(w, QuantizationConfig(kind="float"), name="w")
    torch.testing.assert_close(made.scale, w.abs().amax(-1) / 448)
    assert made.q.float().abs().amax(-1).tolist() == [448.0] * 4
    large = w.abs() > made.scale[:, None] / 64  # below are its subnormal numbers
    assert ((made.dequantized() - w).abs() <= w.abs() * (2**-4 + 1e-6))[large].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    w = torch.randn(4, 64)
    w[2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"blocks.3.ffn.w_in has weights with NaN or infinity \(1\)"):
        round_weight(w, QuantizationConfig(), name="blocks.3.ffn.w_in")


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match=r"group \(64\).*width \(100\)"):
        round_weight(torch.randn(2, 100), QuantizationConfig(bits=4, group=64), name="w")


def test_calibration_without_rows_says_nothing():
    w, cfg, rule = torch.randn(4, 64), QuantizationConfig(bits=4, group=64), ScaleRule(clip="mse")
    made = [round_weight(w, cfg, rule, seen, name="w") for seen in (None, Seen.nothing(64, gram=False))]
    assert torch.equal(made[0].q, made[1].q)


def test_rows_that_are_not_finite_are_an_error_where_they_weigh():
    seen = Seen.nothing(64, gram=False)
    seen.add(torch.full((3, 64), torch.inf))
    with pytest.raises(NonFiniteError, match=r"ffn.w_in has rows with NaN"):
        round_weight(torch.randn(4, 64), QuantizationConfig(), ScaleRule(clip="mse"), seen, name="ffn.w_in")


@pytest.mark.parametrize("cfg", WAYS)
def test_any_type_and_strides_are_taken(cfg):
    w = torch.randn(128, 6)
    assert torch.equal(round_weight(w.mT, cfg, name="w").q, round_weight(w.mT.contiguous(), cfg, name="w").q)
    half = w.mT.bfloat16()
    assert torch.equal(round_weight(half, cfg, name="w").q, round_weight(half.float(), cfg, name="w").q)
