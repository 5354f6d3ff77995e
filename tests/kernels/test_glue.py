"""What stands between the matrix products of a layer: the operations against float64, against what they are made of,
and a row's bits among any number of rows.
"""

import gc
import tracemalloc

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry
from turnout.kernels.cpp import build

TYPES = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
COUNTS = (0, 1, 2, 7, 49)
types = pytest.mark.parametrize(("dtype", "bound"), TYPES, ids=lambda value: str(value))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel is given holds NaN, so that what it leaves unwritten is seen."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def full_of_nan(*args, make=make, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else -(2**60))

        monkeypatch.setattr(torch, name, full_of_nan)


def near(found, truth, bound):
    torch.testing.assert_close(found.double(), truth, rtol=bound, atol=bound)


def layer(tokens, dtype, width=100, heads=3, kv_heads=1, d=20, norms=True):
    made = torch.Generator().manual_seed(1)
    w = [torch.randn(n * d, width, generator=made) / width**0.5 for n in (heads, kv_heads, kv_heads)]
    angles_Th = torch.rand(tokens, d // 2, generator=made) * 9
    norm = [torch.rand(d, generator=made) + 0.5 for _ in range(2)] if norms else []
    x_TD = torch.randn(tokens, width, generator=made)
    parts = [t.to(dtype) for t in (x_TD, *w)], (angles_Th.cos(), angles_Th.sin()), [t.to(dtype) for t in norm]
    return *parts[0], *parts[1], *parts[2], *((1e-6,) if norms else ())


def wide(arguments):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]


@types
@pytest.mark.parametrize("width", [1, 100, 64])
@pytest.mark.usefixtures("poisoned")
def test_a_sum_and_its_norm_are_those_of_the_two_operations(dtype, bound, width):
    for tokens in COUNTS:
        x, y, weight = (torch.randn(shape).to(dtype) for shape in ((tokens, width), (tokens, width), (width,)))
        with kernels.using("cpp"):
            total, normed = kernels.add_rms_norm(x, y, weight, 1e-5)
            assert torch.equal(total, x + y)
            assert torch.equal(normed, kernels.rms_norm(x + y, weight, 1e-5))
        with kernels.using("reference"):
            near(normed, kernels.rms_norm((x + y).double(), weight.double(), 1e-5), bound)


@types
@pytest.mark.parametrize("form", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_heads_are_projected_normalised_and_rotated(dtype, bound, form, norms):
    for tokens in COUNTS:
        arguments = layer(tokens, dtype, norms=norms)
        with kernels.using("reference"):
            truth = kernels.heads(*wide(arguments))
        with kernels.using(form):
            found = kernels.heads(*arguments)
        assert [tuple(t.shape) for t in found] == [(tokens, 3, 20), (tokens, 1, 20), (tokens, 1, 20)]
        for one, other in zip(found, truth, strict=True):
            near(one, other, 2 * bound)


@types
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "d"), [(7, 3, 1, 20), (17, 5, 3, 64), (50, 3, 2, 128)])
def test_heads_have_the_bits_of_the_operations_one_after_another(dtype, bound, norms, tokens, heads, kv_heads, d):
    arguments = layer(tokens, dtype, norms=norms, heads=heads, kv_heads=kv_heads, d=d)
    arguments[0][3, 5] = float("inf")
    with kernels.using("cpp"):
        found = kernels.heads(*arguments)
        composed = kernels.heads(*(t.requires_grad_() if t is arguments[0] else t for t in arguments))
    assert composed[0].requires_grad
    for one, other in zip(found, composed, strict=True):
        assert not one[3].isfinite().all()
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in TYPES], ids=str)
def test_S0_a_row_has_the_same_bits_among_any_number_of_rows(dtype, threads):  # noqa: N802
    x, w_q, w_k, w_v, cos, sin, *norms = layer(97, dtype, width=256, d=64)
    y = x.flip(0)
    logits = torch.randn(97, 33)

    def everything(rows):
        heads = kernels.heads(x[rows], w_q, w_k, w_v, cos[rows], sin[rows], *norms)
        turned = kernels.rotate(x[rows].view(-1, 4, 64)[..., :40], cos[rows, :20], sin[rows, :20])
        gates = kernels.top_k_gates(logits[rows], 5, renormalize=True)
        return *heads, turned, *gates, *kernels.add_rms_norm(x[rows], y[rows], x[0], 1e-5)

    with kernels.using("cpp"):
        whole = everything(slice(None))
        for rows in (slice(0, 1), slice(96, 97), slice(3, 10), slice(1, 50)):
            assert all(torch.equal(own, all_[rows]) for own, all_ in zip(everything(rows), whole, strict=True))


@types
def test_rotate_is_rope_of_known_angles_to_the_bit(dtype, bound):
    positions, turns = torch.arange(9) * 100, torch.rand(5)
    x = torch.randn(9, 3, 14).to(dtype)[..., 2:12]
    angles = positions[:, None] * turns
    for form in ("reference", "cpp"):
        with kernels.using(form):
            y = kernels.rotate(x, angles.cos() * 1.5, angles.sin() * 1.5)
        assert torch.equal(y, kernels.rope(x, positions, turns, 1.5))


RULES = {
    "softmax": (8, 2, {}),
    "all experts": (33, 33, {"renormalize": True}),
    "one expert": (1, 1, {}),
    "renormalised": (128, 8, {"renormalize": True}),
    "groups": (60, 6, {"groups": 10, "top_groups": 3, "scale": 2.5}),
    "sigmoid": (33, 4, {"score": "sigmoid"}),
    "biased": (40, 4, {"score": "sigmoid", "bias_E": torch.linspace(-1, 1, 40), "renormalize": True}),
    "DeepSeek-V3": (256, 8, {
        "score": "sigmoid", "bias_E": torch.linspace(1, -1, 256), "groups": 8, "top_groups": 4, "best": 2,
        "renormalize": True, "scale": 2.5,
    }),
    "chosen": (33, 4, {"score": "chosen"}),
}  # fmt: skip
rules = pytest.mark.parametrize(("experts", "top_k", "rule"), RULES.values(), ids=RULES)


def tied(tokens, experts):
    """Logits of few different values, so that many are alike; some are not finite."""
    logits_TE = (torch.randn(tokens, experts) * 2).bfloat16().float()
    if tokens > 5 and experts > 6:
        logits_TE[2, 5], logits_TE[3, 2] = torch.inf, torch.nan
        logits_TE[4, : experts - 1], logits_TE[5] = -torch.inf, 0.0
        logits_TE[5, 1] = -0.0
    return logits_TE


@rules
@pytest.mark.usefixtures("poisoned")
def test_the_choice_is_the_references_and_so_nearly_are_the_weights(experts, top_k, rule):
    for tokens in (*COUNTS, 500):
        logits_TE = tied(tokens, experts)
        with kernels.using("reference"):
            wanted, weights = kernels.top_k_gates(logits_TE, top_k, **rule)
        with kernels.using("cpp"):
            ids, found = kernels.top_k_gates(logits_TE, top_k, **rule)
            again, known = kernels.top_k_gates(logits_TE, top_k, ids_TK=wanted, **rule)
        assert torch.equal(ids, wanted)
        assert torch.equal(again, wanted)
        assert torch.equal(known.nan_to_num(-1), found.nan_to_num(-1))
        torch.testing.assert_close(found, weights, rtol=3e-6, atol=1e-7, equal_nan=True)
        if tokens > 5 and experts > 6:
            finite = torch.arange(tokens) > 4
            given = {name: value.double() if name == "bias_E" else value for name, value in rule.items()}
            truth = kernels.top_k_gates(logits_TE[finite].double(), top_k, ids_TK=ids[finite], **given)[1]
            torch.testing.assert_close(found[finite].double(), truth, rtol=3e-6, atol=1e-7)


@rules
def test_gradients_of_the_weights_are_the_references(experts, top_k, rule):
    logits_TE = torch.randn(7, experts, requires_grad=True)
    grad_TK = torch.randn(7, top_k)
    found = {}
    for form in ("reference", "cpp"):
        with kernels.using(form):
            ids, weights = kernels.top_k_gates(logits_TE, top_k, **rule)
        assert not ids.requires_grad
        found[form] = torch.autograd.grad(weights, logits_TE, grad_TK)[0]
    torch.testing.assert_close(found["cpp"], found["reference"], rtol=1e-5, atol=1e-6)


def test_gradients_of_heads_and_sums_are_the_references():
    *tensors, eps = layer(5, torch.float64)
    leaves = [t.double().requires_grad_() for t in tensors]

    def through(x, w_q, w_k, w_v, cos, sin, norm_q, norm_k):
        total, normed = kernels.add_rms_norm(x, x.flip(0), torch.ones(x.shape[1], dtype=x.dtype), 1e-5)
        q, k, v = kernels.heads(normed, w_q, w_k, w_v, cos, sin, norm_q, norm_k, eps)
        return (q.sin().sum() + k.cos().sum() + v.square().sum() + total.sum()).reshape(1)

    exact = torch.autograd.grad(through(*leaves), leaves[:4])
    narrow = [t.detach().float().requires_grad_() for t in leaves]
    with kernels.using("cpp"):
        found = torch.autograd.grad(through(*narrow), narrow[:4])
    for one, other in zip(found, exact, strict=True):
        near(one, other, 1e-4)


def test_ours_run_unasked_in_bfloat16_where_nothing_learns():
    if build.library() is None:
        return
    arguments, logits = layer(2, torch.bfloat16), torch.randn(2, 8)
    rows = arguments[0]
    calls = {"heads": arguments, "add_rms_norm": (rows, rows, rows[0], 1e-5), "top_k_gates": (logits, 2)}
    with torch.inference_mode():
        assert [registry.choose(op, *call) for op, call in calls.items()] == ["cpp"] * 3
        assert registry.choose("rms_norm", rows, torch.nn.Parameter(rows[0]), 1e-5) == "cpp"
        assert registry.choose("heads", *layer(2, torch.float32)) == "torch"
    for mode in (torch.enable_grad, torch.no_grad):  # the first pass of a recomputed block has no gradient either
        with mode():
            assert "cpp" not in [registry.choose(op, *call) for op, call in calls.items()]


def test_a_row_that_is_not_finite_spoils_no_other():
    arguments = layer(9, torch.bfloat16)
    clean = kernels.heads(*arguments)
    arguments[0][4, 7] = torch.nan
    others = torch.arange(9) != 4
    for before, after in zip(clean, kernels.heads(*arguments), strict=True):
        assert after[4].isnan().all()
        assert torch.equal(after[others], before[others])


@pytest.mark.full
def test_every_instruction_set_computes_the_same_nearly(monkeypatch):
    arguments, logits = layer(37, torch.bfloat16), torch.randn(37, 64)
    with kernels.using("reference"):
        truth = *kernels.heads(*wide(arguments)), *kernels.top_k_gates(logits, 4)
    for needed, flags in build.INSTRUCTIONS:
        if not needed <= build._cpu():
            continue
        library = build.load(flags)
        monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda library=library: library)
        with kernels.using("cpp"):
            found = *kernels.heads(*arguments), *kernels.top_k_gates(logits, 4)
        for one, other in zip(found, truth, strict=True):
            near(one, other.double(), 4e-2 if one.dtype == torch.bfloat16 else 3e-6)


@pytest.mark.full
def test_a_thousand_calls_keep_nothing():
    arguments, logits = layer(2, torch.bfloat16), torch.randn(2, 8)

    def once():
        kernels.heads(*arguments)
        kernels.add_rms_norm(arguments[0], arguments[0], arguments[0][0], 1e-5)
        kernels.top_k_gates(logits, 2)

    def held() -> int:
        """Bytes after a thousand calls: the first thousand also fills the interpreter's own caches."""
        for _ in range(1000):
            once()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before = held()
    grown = held() - before
    tracemalloc.stop()
    assert grown < 10_000
