"""GPTQ against the recursion written out: at each column the rest of the Hessian is inverted afresh, in float64."""

from dataclasses import replace

import pytest
import torch

from turnout import NonFiniteError
from turnout.kernels.quantized import nearest
from turnout.moe.compress.clipping import MAXIMUM, ScaleRule, fit_scale
from turnout.moe.compress.gptq import gptq
from turnout.moe.compress.rounding import round_weight
from turnout.moe.compress.seen import Seen
from turnout.moe.quantization_config import QuantizationConfig

INT4 = QuantizationConfig(bits=4, group=64)
WAYS = [QuantizationConfig(), QuantizationConfig(zero=True), QuantizationConfig(kind="float"), INT4,
        replace(INT4, zero=True), replace(INT4, group=192), QuantizationConfig(group=64)]  # fmt: skip


def rows_of(count, width, seed=0):
    """Rows whose channels go together, as those of trained models do."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw) @ torch.randn(width, width, generator=draw)


def seen_of(x):
    seen = Seen.nothing(x.shape[1], gram=True)
    seen.add(x)
    return seen


def weight(rows, width, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def reference(w, seen, cfg, damp=0.01, order=None, rule=MAXIMUM):
    """Column by column in float64: H⁻¹ of the columns from c on is computed afresh, every later one updated at once."""
    w, width = w.double(), w.shape[1]
    original, size = w.clone(), cfg.group or width
    static, order = order is not None, torch.arange(width) if order is None else order
    h = 2 * seen.gram_DD.double()
    h = (h + damp * h.diagonal().mean() * torch.eye(width, dtype=h.dtype))[order][:, order]
    w, scales = w[:, order], {}
    for c in range(width):
        group = int(order[c]) // size
        if group not in scales:
            span = slice(group * size, (group + 1) * size)
            source = original[:, span] if static or cfg.group is None else w[:, span]
            scales[group] = fit_scale(source, cfg, rule, seen.square_D[span])
        scale, zero = (x.flatten().double() if x.numel() else None for x in scales[group])
        q = nearest(w[:, c], scale, zero, cfg.bits, cfg.kind)
        made = scale * (q if zero is None else q - zero)
        left = torch.linalg.inv(h[c:, c:])
        w[:, c:] -= ((w[:, c] - made) / left[0, 0])[:, None] * left[0]
        w[:, c] = made
    return torch.empty_like(w).index_copy_(1, order, w)


@pytest.mark.parametrize("cfg", WAYS)
def test_columns_are_rounded_as_the_paper_rounds_them(cfg):
    width = 384 if cfg.group == 192 else 256 if cfg.group else 200
    w, seen = weight(8, width), seen_of(rows_of(2 * width, width))
    made, fitted = gptq(w.double(), seen, cfg, name="w")
    torch.testing.assert_close(made.dequantized().double(), reference(w, seen, cfg), rtol=1e-5, atol=1e-5)
    plain = round_weight(w, cfg, name="w")
    assert made.scale.shape == plain.scale.shape
    assert made.zero.shape == plain.zero.shape
    assert fitted.fallback is None
    assert fitted.after < fitted.before * 0.8
    off = w.double() - made.dequantized().double()
    assert fitted.after == pytest.approx(float(((off @ seen.gram_DD.double()) * off).sum()), rel=1e-3)


@pytest.mark.parametrize("cfg", [QuantizationConfig(), INT4, replace(INT4, zero=True)])
def test_columns_may_come_by_their_moments_and_are_stored_in_their_own_order(cfg):
    w, x = weight(8, 128), rows_of(300, 128) * torch.rand(128, generator=torch.Generator().manual_seed(3))
    seen = seen_of(x)
    made, fitted = gptq(w.double(), seen, cfg, name="w", act_order=True)
    order = seen.square_D.argsort(descending=True, stable=True)
    expected = reference(w, seen, cfg, order=order)
    torch.testing.assert_close(made.dequantized().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(made.scale, round_weight(w, cfg, name="w").scale), "scales of groups are the weights' own"
    assert fitted.after < fitted.before


def test_float32_is_as_good_as_float64():
    w, seen = weight(16, 256), seen_of(rows_of(600, 256))
    narrow, wide = (gptq(one, seen, INT4, name="w")[1].after for one in (w, w.double()))
    assert narrow == pytest.approx(wide, rel=0.05)


@pytest.mark.parametrize("clip", ["percentile", "mse"])
def test_scales_of_groups_follow_the_rule(clip):
    w, seen = weight(8, 128), seen_of(rows_of(300, 128) * torch.logspace(-1, 1, 128))
    rule = ScaleRule(clip=clip, percentile=95)
    made, fitted = gptq(w.double(), seen, INT4, rule, name="w")
    expected = reference(w, seen, INT4, rule=rule)
    torch.testing.assert_close(made.dequantized().double(), expected, rtol=1e-5, atol=1e-5)
    assert (made.scale < gptq(w, seen, INT4, name="w")[0].scale).float().mean() > 0.5
    assert fitted.after < fitted.before
    whole, _ = gptq(w, seen, INT4, replace(rule, whole=True), name="w")
    assert whole.scale.unique().numel() == 1


def test_columns_that_nothing_meets_are_rounded_to_nearest():
    x = rows_of(300, 128)
    x[:, [3, 70]] = 0
    w, cfg = weight(8, 128), QuantizationConfig()
    made, fitted = gptq(w, seen_of(x), cfg, name="w")
    assert fitted.fallback is None
    assert torch.equal(made.q[:, [3, 70]], round_weight(w, cfg, name="w").q[:, [3, 70]])


@pytest.mark.parametrize(
    ("rows", "damp", "says"),
    [(0, 0.01, "saw 0 rows, fewer than 5"), (4, 0.01, "saw 4 rows, fewer than 5"), (8, 0.0, "not positive definite")],
)
def test_where_calibration_can_not_decide_the_weights_alone_do(rows, damp, says):
    w, rule = weight(8, 128), ScaleRule(clip="mse")
    seen = seen_of(torch.randint(-3, 4, (rows, 1)) * torch.ones(rows, 128))
    made, fitted = gptq(w, seen, INT4, rule, name="ffn.experts.w_in[3]", damp=damp, min_rows=5)
    assert says in fitted.fallback
    assert (fitted.name, fitted.rows) == ("ffn.experts.w_in[3]", rows)
    assert fitted.after == fitted.before
    weighed = seen if rows >= 5 else None
    assert torch.equal(made.q, round_weight(w, INT4, rule, weighed, name="w").q)


def test_too_few_rows_do_not_weigh_errors_either():
    w, rule, seen = weight(8, 128), ScaleRule(clip="mse"), seen_of(rows_of(4, 128) * torch.logspace(-2, 2, 128))
    alone, weighed = (round_weight(w, INT4, rule, one, name="w").scale for one in (None, seen))
    assert not torch.equal(alone, weighed)
    assert torch.equal(gptq(w, seen, INT4, rule, name="w", min_rows=5)[0].scale, alone)


def test_rows_of_zeros_decide_nothing():
    assert gptq(weight(4, 64), seen_of(torch.zeros(9, 64)), INT4, name="w")[1].fallback == "saw rows of zeros only"


def test_fewer_rows_than_channels_are_enough():
    w, seen = weight(8, 256), seen_of(rows_of(40, 256))
    _, fitted = gptq(w, seen, INT4, name="w", min_rows=32)
    assert fitted.fallback is None
    assert fitted.after < fitted.before / 2


def test_what_is_not_finite_is_named():
    w, seen = weight(4, 64), seen_of(rows_of(100, 64))
    with pytest.raises(NonFiniteError, match=r"attention\.wq has weights with NaN"):
        gptq(torch.full_like(w, torch.nan), seen, INT4, name="attention.wq")
    seen.gram_DD[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"attention\.wq has rows with NaN"):
        gptq(w, seen, INT4, name="attention.wq")
