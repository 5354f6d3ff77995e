"""The layer of experts in Triton, interpreted with its production tiles, against float64 and against itself."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import moe_mlp, registry
from turnout.kernels.configs import EXPERT_FLOAT_TILES, EXPERT_HALF_TILES, few
from turnout.kernels.triton import experts
from turnout.kernels.triton.decode_experts import decode

BOUND = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TILES = [(torch.float32, tiles) for _, tiles in EXPERT_FLOAT_TILES]
TILES += [(torch.bfloat16, tiles) for _, tiles in EXPERT_HALF_TILES]
# tokens, choices, experts, width, hidden, share kept
GRID = [
    (0, 2, 4, 16, 8, 1),
    (1, 1, 1, 16, 8, 1),
    (1, 3, 3, 65, 17, 1),
    (9, 2, 5, 24, 15, 0),
    (17, 4, 4, 40, 63, 1),
    (33, 2, 8, 130, 65, 0.6),
    (140, 1, 3, 16, 8, 0.9),
    (20, 8, 60, 16, 40, 0.9),
]
QUICK = (33, 2, 6, 72, 40, 0.8)


def make(T, K, E, D, F, share, dtype, hot=False):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.empty(0, K, dtype=torch.int64)
    ids = ids * 0 + E - 1 if hot else ids
    kept = None if share == 1 else torch.rand(T, K) < share
    weights = torch.rand(T, K)
    if kept is not None:
        ids, weights = ids.masked_fill(~kept, 10**6), weights.masked_fill(~kept, torch.nan)
    x, w_in = torch.randn(T, D).to(dtype), (torch.randn(E, 2 * F, D) / D**0.5).to(dtype)
    return x, ids, weights, kept, w_in, (torch.randn(E, F, D) / F**0.5).to(dtype)


def dense(x, ids, weights, kept, w_in, w_out):
    """Every expert of every token in float64, weighted; differentiable."""
    gate, up = torch.einsum("td,ehd->teh", x, w_in).chunk(2, -1)
    y = torch.einsum("tef,efd->ted", torch.nn.functional.silu(gate) * up, w_out)
    kept = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept
    shares = torch.zeros(len(x), len(w_in), dtype=torch.float64)
    for k in range(ids.shape[1]):
        own = torch.where(kept[:, k], weights[:, k], 0.0)
        shares = shares.scatter_add(1, ids[:, k : k + 1].masked_fill(~kept[:, k : k + 1], 0), own[:, None])
    return torch.einsum("te,ted->td", shares, y)


def assert_near(value, truth, dtype):
    assert value.shape == truth.shape
    assert not value.isnan().any()
    assert (value.double() - truth).norm() <= BOUND[dtype] * truth.norm() + 1e-12


def check(args, run=None):
    """Result and all four gradients."""
    x, ids, weights, kept, w_in, w_out = args
    leaves = [t.clone().requires_grad_() for t in (x, weights, w_in, w_out)]
    leaves64 = [t.double().requires_grad_() for t in (x, weights, w_in, w_out)]
    call = (leaves[0], ids, leaves[1], kept, *leaves[2:])
    with kernels.using("triton"):
        assert registry.choose("moe_mlp", *call) == "triton"
        out = (run or moe_mlp)(*call)
    truth = dense(leaves64[0], ids, leaves64[1], kept, *leaves64[2:])
    assert out.dtype == x.dtype
    assert_near(out, truth, x.dtype)
    grad = torch.randn_like(x)
    truths = torch.autograd.grad(truth, leaves64, grad.double())
    for value, exact in zip(torch.autograd.grad(out, leaves, grad), truths, strict=True):
        assert_near(value, exact.nan_to_num(), x.dtype)


def with_tiles(tiles):
    return lambda *args: experts.MoeMlp.apply(*args, True, tiles)


def test_forward_and_gradients_agree_with_float64():
    check(make(*QUICK, torch.bfloat16))


def test_few_tokens_agree_with_float64_and_with_themselves_in_a_batch():
    x, ids, weights, kept, w_in, w_out = make(3, 4, 48, 72, 40, 0.8, torch.bfloat16)
    assert few(*ids.shape, len(w_in))
    with kernels.using("triton"):
        together = moe_mlp(x, ids, weights, kept, w_in, w_out)
        alone = moe_mlp(x[1:2], ids[1:2], weights[1:2], kept[1:2], w_in, w_out)
    truth = dense(x.double(), ids, weights.double(), kept, w_in.double(), w_out.double())
    assert_near(together, truth, torch.bfloat16)
    assert torch.equal(together[1:2], alone)


def test_a_row_has_the_same_bits_alone_and_in_any_batch():
    rows_alike(torch.bfloat16, EXPERT_HALF_TILES[1][1])


def rows_alike(dtype, tiles):
    x, ids, weights, kept, w_in, w_out = make(40, 2, 3, 72, 40, 0.8, dtype)
    together = experts.MoeMlp.apply(x, ids, weights, kept, w_in, w_out, False, tiles)
    for rows in (slice(0, 1), slice(17, 20)):
        part = (x[rows], ids[rows], weights[rows], kept[rows])
        assert torch.equal(experts.MoeMlp.apply(*part, w_in, w_out, False, tiles), together[rows])


def test_only_the_input_the_projections_and_the_routing_are_saved_and_only_for_gradients():
    x, ids, weights, kept, w_in, w_out = make(*QUICK, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), kernels.using("triton"):
        moe_mlp(x, ids, weights, kept, w_in, w_out)
        assert not saved
        w_in.requires_grad_()
        grad = torch.autograd.grad(moe_mlp(x, ids, weights, kept, w_in, w_out).sum(), w_in)[0]
    own = [
        t for t in saved if t.data_ptr() not in {x.data_ptr(), weights.data_ptr(), w_in.data_ptr(), w_out.data_ptr()}
    ]
    assert [tuple(t.shape) for t in own] == [(ids.numel(), w_in.shape[1])]
    assert grad.isfinite().all()


def test_an_expert_without_rows_has_a_gradient_of_zero():
    x, ids, weights, _, w_in, w_out = make(4, 1, 5, 16, 8, 1, torch.float32, hot=True)
    w_in.requires_grad_()
    with kernels.using("triton"):
        (grad,) = torch.autograd.grad(moe_mlp(x, ids, weights, None, w_in, w_out).sum(), w_in)
    assert (grad[:-1] == 0).all()
    assert (grad[-1] != 0).any()


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("case", GRID)
def test_grid(case, hot, dtype):
    check(make(*case, dtype, hot))
    x, ids, weights, kept, w_in, w_out = make(*case, dtype, hot)
    truth = dense(x.double(), ids, weights.double(), kept, w_in.double(), w_out.double())
    assert_near(decode(x, ids, weights, kept, w_in, w_out), truth, dtype)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tiles"), TILES)
def test_every_tile_of_the_table_is_right_and_treats_rows_alike(dtype, tiles):
    check(make(100, 2, 3, 136, 140, 0.8, dtype), with_tiles(tiles))
    rows_alike(dtype, tiles)


@pytest.mark.full
def test_strided_operands_are_addressed_by_their_strides():
    x, ids, weights, kept, w_in, w_out = make(*QUICK, torch.float32)
    x, w_in, w_out = x.T.contiguous().T, w_in.mT.contiguous().mT, w_out.mT.contiguous().mT
    check((x, ids, weights, kept, w_in, w_out))
    truth = dense(x.double(), ids, weights.double(), kept, w_in.double(), w_out.double())
    assert_near(decode(x, ids, weights, kept, w_in, w_out), truth, torch.float32)
