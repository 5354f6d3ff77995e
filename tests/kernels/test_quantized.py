"""Weights of eight and four bits: what they are, and products with them in every form against the written-out one."""

from functools import partial

import pytest
import torch

from turnout import ConfigError, kernels
from turnout.kernels import quantize_weight
from turnout.kernels.cpp import build
from turnout.kernels.quantized import encode, find_scale, quantize_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
w8a8 = partial(quantize_weight, rows="int8")


def _close(ours, theirs, dtype, least=1e-5):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=max(tolerance, least))


@pytest.mark.parametrize(("bits", "most", "step"), [(8, 127, 1 / 127), (4, 7, 1 / 7)])
def test_a_weight_is_off_by_half_a_step_of_its_largest_neighbour_at_most(bits, most, step):
    w = torch.randn(3, 5, 128)
    groups = w.unflatten(-1, (-1, 64 if bits == 4 else 128))
    largest = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2)
    packed = quantize_weight(w, bits)
    assert ((packed.dequantized() - w).abs() <= largest * step / 2 * 1.001).all()
    assert torch.equal(quantize_weight(-w, bits).dequantized(), -packed.dequantized()), "symmetric"
    assert packed.q.numel() * packed.q.element_size() == w.numel() * bits // 8
    assert (packed.dequantized() / largest).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_clipping_bounds_what_is_large_and_rounds_the_rest_finer(bits):
    w = torch.cat((torch.linspace(-0.1, 0.1, 63), torch.tensor([1.0])))[None]
    plain, clipped = (quantize_weight(w, bits, clip=clip).dequantized() for clip in (1.0, 0.5))
    assert clipped.max() == pytest.approx(0.5)
    assert (clipped - w)[0, :63].abs().max() < (plain - w)[0, :63].abs().max()


KINDS = (
    {"bits": 8}, {"bits": 8, "zero": True}, {"bits": 8, "group": 64}, {"bits": 8, "group": 128, "zero": True},
    {"bits": 4}, {"bits": 4, "group": 192, "zero": True}, {"kind": "float"},
)  # fmt: skip


@pytest.mark.parametrize("how", KINDS)
def test_every_kind_of_weight_is_near_its_numbers_and_keeps_zeros(how):
    w = torch.rand(3, 5, 384) - 0.1
    w[0, 1, :200], w[1, 2] = 0.0, 0.0
    packed = quantize_weight(w, **how)
    steps = {8: 254, 4: 14}[packed.bits] / (1.0 if packed.zero.numel() else 2.0)
    groups = w.unflatten(-1, (packed.groups, -1))
    reach = (groups.amax(-1) - groups.amin(-1).clamp_max(0)) if packed.zero.numel() else groups.abs().amax(-1)
    off = (packed.dequantized() - w).unflatten(-1, (packed.groups, -1)).abs()
    bound = groups.abs() / 16 + 1e-4 if packed.kind == "float" else reach[..., None] * (1.001 / 2 / steps)
    assert (off <= bound).all()
    assert not packed.dequantized()[w == 0].any()
    assert torch.equal(packed[1].dequantized(), packed.dequantized()[1])
    assert torch.equal(packed[1][2:4].dequantized(), packed.dequantized()[1, 2:4])


@pytest.mark.parametrize("how", KINDS)
def test_what_has_been_rounded_stays_as_it_is_under_its_own_scale(how):
    packed = quantize_weight(torch.randn(4, 384), **how)
    again = encode(packed.dequantized(), packed.scale, packed.zero, packed.bits, kind=packed.kind)
    assert torch.equal(again.q.view(torch.uint8), packed.q.view(torch.uint8))


def test_each_scale_can_have_a_clip_of_its_own():
    w = torch.randn(4, 128)
    clip = torch.rand(4, 2) * 0.5 + 0.5
    (scale, zero), (whole, _) = (find_scale(w, 4, 64, by, zero=True) for by in (clip, 1.0))
    torch.testing.assert_close(scale, whole * clip)
    assert zero.shape == (4, 2)
    assert torch.equal(zero, zero.round())


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(how, bad):
    w = torch.randn(2, 384)
    w[1, 7] = bad
    with pytest.raises(ConfigError, match=r"scale .* must be finite: look for NaN and infinities"):
        quantize_weight(w, **how)


def test_a_row_of_zeros_is_zero_and_one_that_is_not_finite_is_nan():
    x = torch.tensor([[0.0, 0.0], [1.0, float("inf")], [float("nan"), 2.0], [-3.0, 1.0]])
    q, scale = quantize_rows(x)
    assert torch.equal(q[[0, 3]], torch.tensor([[0.0, 0.0], [-127.0, 42.0]]))
    assert scale[1:3].isnan().all()
    assert scale[[0, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"bits": 3}, r"bits \(3\) must be 4 or 8: use 8"), ({"clip": 0.0}, r"clip \(0\) must be above 0"),
     ({"clip": torch.tensor([0.5, 1.1])}, r"clip \(1\.1\) must be above 0"),
     ({"kind": "float", "rows": "int8"}, r"rows \(int8\) must be float for e4m3"),
     ({"bits": 8, "group": 48}, r"group \(48\) must be a multiple"),
     ({"kind": "float", "zero": True}, r"kind \(float\) goes with 8 bits \(8\) and no zero points"),
     ({"kind": "float", "group": 64}, r"group \(64\) must be None for e4m3"),
     ({"bits": 4, "group": 96}, r"group \(96\) must be a multiple of 64 that divides the width \(128\)")],
)  # fmt: skip
def test_what_can_not_be_is_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        quantize_weight(torch.randn(2, 128), **wrong)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(2, 1)])
def test_four_bits_of_a_width_that_blocks_do_not_divide_are_refused_under_scales_from_outside(scale):
    with pytest.raises(ConfigError, match=r"group \(96\) must be a multiple of 64 that divides the width \(96\)"):
        encode(torch.randn(2, 96), scale, bits=4)


def test_a_row_longer_than_32_bits_can_sum_is_refused_under_one_scale():
    w = torch.ones(1, 64 + (1 << 17))
    with pytest.raises(ConfigError, match=r"width \(131136\) must be at most 131072 for one scale"):
        quantize_weight(w)
    x, w = -torch.ones(1, 1 << 17), quantize_weight(-w[:, 64:], rows="int8")
    assert kernels.quantized_linear(x, w).item() == pytest.approx(1 << 17, rel=1e-4)


@pytest.mark.parametrize("how", KINDS)
def test_weights_too_small_for_a_scale_are_zeros_and_zeros_among_them_stay(how):
    w = torch.rand(3, 384) * -6e-43
    w[:, ::3] = 0.0
    packed = quantize_weight(w, **how)
    assert not packed.dequantized().any()
    assert not kernels.quantized_linear(torch.randn(2, 384), packed).any()


@pytest.mark.parametrize("rows", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_small_for_a_turn_are_zeros_in_every_form(rows, dtype):
    x = torch.zeros(3, 64, dtype=dtype)
    x[0, 5], x[1, :7], x[2, 0] = 1e-38, -3e-38, 1.0
    w = quantize_weight(torch.randn(5, 64), rows=rows)
    y = kernels.quantized_linear(x, w)
    with kernels.using("reference"):
        _close(kernels.quantized_linear(x, w), y, dtype)
    assert y[:2].abs().max() < 1e-35
    assert y[2].any()


@pytest.mark.parametrize("part", [slice(None, None, 2), torch.tensor([4, 1]), slice(3, 3)])
def test_rows_of_a_weight_are_multiplied_wherever_they_lay(part):
    w, x = quantize_weight(torch.randn(6, 64), zero=True), torch.randn(3, 64)
    torch.testing.assert_close(kernels.quantized_linear(x, w[part]), kernels.quantized_linear(x, w)[:, part])


def test_a_mixture_may_hold_other_bits_in_than_out_and_rows_may_lie_anywhere():
    x, ids, weights, kept, w_in, w_out = _mixture(9, 4, 128, 65, 2)
    q_in, q_out = quantize_weight(w_in, 4, zero=True), quantize_weight(w_out.mT, zero=True)
    strided = (x.mT.contiguous().mT, ids.mT.contiguous().mT, weights.mT.contiguous().mT, kept.mT.contiguous().mT)
    y = kernels.quantized_moe_mlp(*strided, q_in, q_out)
    assert torch.equal(y, kernels.quantized_moe_mlp(x, ids, weights, kept, q_in, q_out))
    with kernels.using("reference"):
        torch.testing.assert_close(
            y, kernels.quantized_moe_mlp(x, ids, weights, kept, q_in, q_out), rtol=1e-4, atol=1e-3
        )
    none = kernels.quantized_moe_mlp(x, ids, weights, torch.zeros_like(kept), q_in, q_out)
    assert not none.any(), "a token of which nothing is kept"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (5, 37)])
def test_rows_as_they_are_meet_every_kind_of_weight_alone_as_in_company(how, rows, columns, dtype):
    x, bias = torch.randn(rows, 384).to(dtype), torch.randn(columns)
    w = quantize_weight(torch.randn(columns, 384) + 0.3, **how)
    y = kernels.quantized_linear(x, w, bias)
    with kernels.using("reference"):
        _close(y, kernels.quantized_linear(x, w, bias), dtype, least=3e-3)
    assert torch.equal(torch.cat([kernels.quantized_linear(row[None], w, bias) for row in x]), y)


def test_rows_as_they_are_keep_more_than_bfloat16_does_beside_numbers_that_are_a_thousand_times_as_large():
    x = torch.randn(16, 1536)
    x[:, 7] *= 1000
    w = quantize_weight(torch.randn(64, 1536))
    exact = x.double() @ w.dequantized(torch.float64).mT
    ours = (kernels.quantized_linear(x, w).double() - exact).norm()
    assert ours < 0.5 * (x.bfloat16().double() @ w.dequantized(torch.float64).mT - exact).norm()


def test_a_row_that_is_not_finite_spoils_no_other():
    x = torch.randn(4, 64)
    x[1, 3], x[2], x[3, 0] = torch.inf, 0.0, torch.nan
    for how in KINDS[:2]:
        y = kernels.quantized_linear(x, quantize_weight(torch.randn(7, 64), **how))
        assert y.isfinite().all(-1).tolist() == [True, False, True, False]
        assert not y[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "rows", "columns", "depth"),
    [(8, 1, 16, 64), (8, 7, 37, 65), (8, 5, 300, 3), (4, 1, 16, 64), (4, 9, 37, 192), (8, 0, 4, 8), (4, 19, 270, 128)],
)
def test_rows_are_multiplied_as_the_reference_writes_it_and_alone_as_in_company(bits, rows, columns, depth, dtype):
    x, bias = torch.randn(rows, depth).to(dtype), torch.randn(columns)
    w = w8a8(torch.randn(columns, depth), bits)
    with kernels.using("reference"):
        expected = kernels.quantized_linear(x, w, bias)
    y = kernels.quantized_linear(x, w, bias)
    _close(y, expected, dtype)
    alone = [kernels.quantized_linear(row[None], w, bias) for row in x]
    assert torch.equal(torch.cat(alone) if alone else y, y)


def _near(ours, theirs, dtype):
    """Of a mixture: where hidden numbers lie halfway between two whole ones, either may be taken."""
    off = (ours.float() - theirs.float()).norm()
    assert off <= (2e-3 if dtype == torch.float32 else 1e-2) * theirs.float().norm()


def _mixture(tokens, experts, width, hidden, choices, hot=False):
    w_in, w_out = (
        torch.randn(experts, 2 * hidden, width) / width**0.5,
        torch.randn(experts, hidden, width) / hidden**0.5,
    )
    ids = torch.rand(tokens, experts).topk(choices)[1]
    kept = torch.rand(tokens, choices) > 0.3
    if hot:
        ids, kept = torch.full_like(ids, experts - 1), torch.ones_like(kept)
    return torch.randn(tokens, width), ids.where(kept, -7), torch.rand(tokens, choices), kept, w_in, w_out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "shape", [(1, 8, 64, 64, 2), (23, 5, 128, 192, 5), (40, 3, 64, 128, 1, True), (0, 4, 64, 64, 2)]
)
def test_a_mixture_is_what_the_reference_writes_and_a_row_never_feels_its_neighbours(shape, bits, dtype):
    x, ids, weights, kept, w_in, w_out = _mixture(*shape)
    x, q_in, q_out = x.to(dtype), w8a8(w_in, bits), w8a8(w_out.mT, bits)
    with kernels.using("reference"):
        expected = kernels.quantized_moe_mlp(x, ids, weights, kept, q_in, q_out)
    y = kernels.quantized_moe_mlp(x, ids, weights, kept, q_in, q_out)
    _near(y, expected, dtype)
    for t in range(0, len(x), 7):
        alone = kernels.quantized_moe_mlp(
            x[t : t + 1], ids[t : t + 1], weights[t : t + 1], kept[t : t + 1], q_in, q_out
        )
        assert torch.equal(alone[0], y[t])


@pytest.mark.parametrize("how", KINDS)
def test_a_mixture_takes_rows_as_they_are_and_every_kind_of_weight(how):
    x, ids, weights, kept, w_in, w_out = _mixture(9, 4, 384, 384, 2)
    q_in, q_out = quantize_weight(w_in, **how), quantize_weight(w_out.mT, **how)
    args = (x, ids, weights, kept, q_in, q_out)
    with kernels.using("reference"):
        expected = kernels.quantized_moe_mlp(*args)
    y = kernels.quantized_moe_mlp(*args)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(kernels.quantized_moe_mlp(*(a[4:5] for a in args[:4]), q_in, q_out)[0], y[4])


@pytest.mark.parametrize("how", [KINDS[1], KINDS[5], KINDS[6], {"rows": "int8"}])
def test_threads_change_no_bit(how):
    x, ids, weights, kept, w_in, w_out = _mixture(9, 4, 384, 384, 2)
    q_in, q_out = quantize_weight(w_in, **how), quantize_weight(w_out.mT, **how)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        mixed = kernels.quantized_moe_mlp(x, ids, weights, kept, q_in, q_out)
        found.append((kernels.quantized_linear(x, q_in[0]), mixed))
    torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize(("form", "dtype"), [("rows", torch.bfloat16), ("invariant", torch.float64)])
@pytest.mark.parametrize("how", [{}, {"bits": 4, "zero": True, "rows": "int8"}])
def test_without_the_kernels_rows_are_alone_as_in_company_too(form, dtype, how):
    x, ids, weights, kept, w_in, w_out = _mixture(9, 4, 384, 192, 2)
    x, kept[3] = x.to(dtype), False
    q_in, q_out = quantize_weight(w_in, **how), quantize_weight(w_out.mT, **how)
    with kernels.using("reference"):
        wanted = kernels.quantized_linear(x, q_in[0]), kernels.quantized_moe_mlp(x, ids, weights, kept, q_in, q_out)
    with kernels.using(form):
        found = kernels.quantized_linear(x, q_in[0]), kernels.quantized_moe_mlp(x, ids, weights, kept, q_in, q_out)
        for t in (0, 3, 8):
            own = slice(t, t + 1)
            assert torch.equal(kernels.quantized_linear(x[own], q_in[0])[0], found[0][t])
            alone = kernels.quantized_moe_mlp(x[own], ids[own], weights[own], kept[own], q_in, q_out)
            assert torch.equal(alone[0], found[1][t])
        assert kernels.quantized_linear(x[:0], q_in[0]).shape == (0, 384)
        assert kernels.quantized_moe_mlp(x[:0], ids[:0], weights[:0], kept[:0], q_in, q_out).shape == (0, 384)
    for ours, theirs in zip(found, wanted, strict=True):
        _near(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.03), (4, 0.25)])
def test_the_error_of_a_mixture_is_as_stated(bits, most):
    x, ids, weights, kept, w_in, w_out = _mixture(64, 8, 256, 256, 2)
    exact = kernels.moe_mlp(x, ids.clamp_min(0), weights, kept, w_in, w_out)
    y = kernels.quantized_moe_mlp(x, ids, weights, kept, w8a8(w_in, bits), w8a8(w_out.mT, bits))
    assert (y - exact).norm() / exact.norm() < most


@pytest.mark.full
@pytest.mark.parametrize("how", [*KINDS, {"rows": "int8"}, {"bits": 4, "rows": "int8"}])
def test_every_set_of_instructions_gives_the_same_products(how, monkeypatch):
    x, ids, weights, kept, w_in, w_out = _mixture(9, 4, 384, 384, 2)
    args = (x, ids, weights, kept, quantize_weight(w_in, **how), quantize_weight(w_out.mT, **how))
    with kernels.using("reference"):
        expected = kernels.quantized_moe_mlp(*args)
    tiers = [flags for needed, flags in build.INSTRUCTIONS if needed <= build._cpu()]
    assert tiers
    for flags in tiers:
        library = build.load(flags)
        monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda library=library: library)
        _near(kernels.quantized_moe_mlp(*args), expected, torch.float32)
