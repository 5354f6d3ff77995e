"""What training keeps and computes: experts with gradients, the head's loss in chunks, norms, rotations, squares."""

import pytest
import torch

from turnout import kernels
from turnout.kernels.cpp import build
from turnout.kernels.torch_ops import experts, loss

T, K, D, E, F = 37, 2, 24, 5, 20
WIDE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYERS = ["even", "hot", "dropped", "one", "none", "all"]


def layer(kind, dtype=torch.float64):
    """A layer's arguments; expert 4 of an even one has no rows."""
    tokens, top_k = {"one": 1, "none": 0}.get(kind, T), E if kind == "all" else K
    ids = torch.stack(
        [torch.randperm(E if kind == "all" else E - 1)[:top_k] for _ in range(tokens)] or [torch.empty(K)]
    )
    ids = ids[:tokens].long()
    if kind == "hot":
        ids[:, 0] = 4
    kept = torch.rand(tokens, top_k) < 0.6 if kind == "dropped" else None
    if kept is not None:
        ids[~kept] = -7
    tensors = [
        torch.randn(tokens, D),
        torch.rand(tokens, top_k),
        torch.randn(E, 2 * F, D) / 3,
        torch.randn(E, F, D) / 3,
    ]
    x, weights, w_in, w_out = (t.to(dtype).requires_grad_() for t in tensors)
    return x, ids, weights, kept, w_in, w_out


def results(run, tensors, grad):
    y = run()
    return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype), allow_unused=True)]


def close(found, exact, dtype):
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs.double()).norm() <= WIDE[dtype] * theirs.double().norm() + 1e-30


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", WIDE)
def test_the_layer_and_its_gradients_are_the_reference_s(kind, dtype):
    x, ids, weights, kept, w_in, w_out = layer(kind)
    grad = torch.randn(x.shape, dtype=torch.float64)
    with kernels.using("reference"):
        exact = results(lambda: kernels.moe_mlp(x, ids, weights, kept, w_in, w_out), (x, weights, w_in, w_out), grad)
    x, weights, w_in, w_out = (t.detach().to(dtype).requires_grad_() for t in (x, weights, w_in, w_out))
    with kernels.using("torch"):
        found = results(lambda: kernels.moe_mlp(x, ids, weights, kept, w_in, w_out), (x, weights, w_in, w_out), grad)
    close(found, exact, dtype)


@pytest.mark.parametrize("counts", [[3, 0, 17, 1, 9], [0, 0, 0, 0, 0], [300, 0, 0, 0, 1]])
def test_rows_that_are_sorted_already_are_computed_alike(counts):
    x = torch.randn(sum(counts), D, dtype=torch.float64, requires_grad=True)
    _, _, _, _, w_in, w_out = layer("even")
    ends, grad = torch.tensor(counts).cumsum(0).int(), torch.randn(x.shape, dtype=torch.float64)
    with kernels.using("reference"):
        exact = results(lambda: kernels.expert_rows(x, ends, w_in, w_out), (x, w_in, w_out), grad)
    for dtype in WIDE:
        ours = [t.detach().to(dtype).requires_grad_() for t in (x, w_in, w_out)]
        close(results(lambda ours=ours: kernels.expert_rows(ours[0], ends, *ours[1:]), ours, grad), exact, dtype)


def test_autocast_keeps_the_weights_and_their_gradients_in_float32():
    x, ids, weights, kept, w_in, w_out = layer("even", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.moe_mlp(x, ids, weights, kept, w_in, w_out)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert w_in.grad.dtype == w_out.grad.dtype == weights.grad.dtype == torch.float32
    assert not w_in.grad[4].any()
    assert not w_out.grad[4].any()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_only_rows_projections_and_the_routing_are_kept(top_k):
    tokens, width, hidden = 256, 64, 32
    x = torch.randn(tokens, width, requires_grad=True)
    ids = torch.stack([torch.randperm(8)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, requires_grad=True)
    w_in, w_out = (torch.randn(8, *shape, requires_grad=True) for shape in ((2 * hidden, width), (hidden, width)))
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        kernels.moe_mlp(x, ids, weights, None, w_in, w_out)
    for weight in (w_in, w_out):
        kept.pop(weight.data_ptr())
    routing = tokens * top_k * (8 + 8 + 4)  # order, slot, weight
    spare = 8 * 8 * 2 * 2 * hidden  # zeros behind the last expert
    wanted = 2 * tokens * width + 2 * tokens * top_k * 2 * hidden + routing
    assert wanted <= sum(kept.values()) <= wanted + spare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_have_the_same_bits(dtype):
    x, ids, weights, kept, w_in, w_out = layer("even", dtype)
    grad = torch.randn(x.shape)
    runs = [
        results(lambda: kernels.moe_mlp(x, ids, weights, kept, w_in, w_out), (x, weights, w_in, w_out), grad)
        for _ in range(2)
    ]
    assert all(map(torch.equal, *runs))


def test_sizes_of_products_are_few_and_waste_little():
    rooms = {experts._room(count) for count in range(1, 8193)}
    assert len(rooms) < 150
    assert all(count <= experts._room(count) <= max(1.07 * count, count + 7) for count in range(1, 8193))


@pytest.mark.parametrize("even", [True, False], ids=["alike", "apart"])
@pytest.mark.parametrize("dtype", WIDE)
def test_the_loss_in_chunks_is_the_loss(dtype, even, monkeypatch):
    monkeypatch.setattr(loss, "FEWEST", 8)
    monkeypatch.setattr(loss, "CHUNK", 1)
    x, w = torch.randn(21, D, dtype=torch.float64), torch.randn(37, D, dtype=torch.float64)
    targets, grad = torch.randint(-1, 37, (21,)), torch.randn(21, dtype=torch.float64)
    grad = grad[:1].expand(21) if even else grad
    runs = {}
    for form, kind in (("reference", torch.float64), ("torch", dtype)):
        ours = [t.to(kind).requires_grad_() for t in (x, w)]
        with kernels.using(form):
            runs[form] = results(lambda ours=ours: kernels.linear_cross_entropy(*ours, targets), ours, grad)
    close(runs["torch"], runs["reference"], dtype)
    assert not runs["torch"][0][targets < 0].any()


def test_no_chunk_s_logits_are_kept(monkeypatch):
    monkeypatch.setattr(loss, "FEWEST", 8)
    monkeypatch.setattr(loss, "CHUNK", 1)
    x, w = torch.randn(64, D, requires_grad=True), torch.randn(5000, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        kernels.linear_cross_entropy(x, w, torch.zeros(64, dtype=torch.int64))
    assert max(kept) == w.numel() < 64 * 5000


def test_a_loss_of_no_tokens_and_of_one_that_is_not_finite():
    w = torch.randn(5, D, requires_grad=True)
    none = kernels.linear_cross_entropy(torch.empty(0, D), w, torch.empty(0, dtype=torch.int64))
    none.sum().backward()
    assert none.shape == (0,)
    assert not w.grad.any()
    found = kernels.linear_cross_entropy(torch.full((1, D), torch.nan), w, torch.zeros(1, dtype=torch.int64))
    assert found.isnan().all()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("rows", [0, 1, 63, 65, 130])
def test_the_norm_and_its_gradients(rows, dtype):
    x, w, grad = (torch.randn(*shape, dtype=torch.float64) for shape in ((rows, 37), (37,), (rows, 37)))
    runs = {}
    for form, kind in (("reference", torch.float64), ("torch", dtype)):
        ours = [x.to(kind).requires_grad_(), w.to(torch.promote_types(kind, torch.float32)).requires_grad_()]
        with kernels.using(form):
            runs[form] = results(lambda ours=ours: kernels.rms_norm(*ours, 1e-5), ours, grad)
    close(runs["torch"], runs["reference"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_has_the_reference_s_bits_and_turns_back(dtype):
    x, positions, turns = torch.randn(30, 3, 24).to(dtype).requires_grad_(), torch.arange(30), torch.rand(12)
    grad = torch.randn(x.shape)
    runs = {}
    for form in ("reference", "torch"):
        with kernels.using(form):
            runs[form] = results(lambda: kernels.rope(x, positions, turns, 1.3), (x,), grad)
    assert all(map(torch.equal, runs["torch"], runs["reference"]))


@pytest.mark.parametrize("count", [0, 1, 15, 17, 100_003])
def test_squares_are_added_in_float64(count):
    x = torch.randn(count)
    found = kernels.square_sum(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x.double().square().sum(), rtol=1e-13, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("flags", [flags for _, flags in build.INSTRUCTIONS[1:]], ids=["avx512", "avx2", "none"])
def test_other_instructions_compute_the_same_within_rounding(flags, monkeypatch):
    if not {"avx512f", "avx2", "fma", "f16c"} <= build._cpu():
        return
    library = build.load(flags)
    monkeypatch.setattr("turnout.kernels.cpp.call.library", lambda: library)
    test_the_layer_and_its_gradients_are_the_reference_s("dropped", torch.bfloat16)
    test_the_layer_and_its_gradients_are_the_reference_s("even", torch.float32)
    test_the_norm_and_its_gradients(65, torch.bfloat16)
    test_the_loss_in_chunks_is_the_loss(torch.bfloat16, False, monkeypatch)
    test_a_rotation_has_the_reference_s_bits_and_turns_back(torch.bfloat16)
