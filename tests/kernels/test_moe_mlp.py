"""A whole mixture of experts in one operation, against float64 products of one choice at a time."""

import pytest
import torch

from turnout.kernels import moe_mlp, using

# tokens, choices, experts, width, hidden width
SHAPES = {
    "no tokens": (0, 2, 4, 8, 8),
    "one token": (1, 2, 4, 64, 32),
    "odd sizes": (5, 3, 4, 7, 5),
    "a choice of one": (3, 1, 2, 40, 33),
    "all experts": (11, 4, 4, 33, 66),
    "empty experts": (4, 2, 60, 96, 64),
    "past a tile": (40, 2, 2, 130, 31),
}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(tokens, choices, experts, width, hidden, dtype=torch.float32):
    x = torch.randn(tokens, width).to(dtype)
    ids = torch.rand(tokens, experts).topk(choices, 1).indices
    weights, kept = torch.rand(tokens, choices), torch.rand(tokens, choices) > 0.2
    w_in = (torch.randn(experts, 2 * hidden, width) / width**0.5).to(dtype)
    w_out = (torch.randn(experts, hidden, width) / hidden**0.5).to(dtype)
    return x, ids, weights, kept, w_in, w_out


def choice_by_choice(x, ids, weights, kept, w_in, w_out):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, k in (torch.ones_like(ids) if kept is None else kept).nonzero().tolist():
        gate, up = (w_in[ids[t, k]].double() @ x[t].double()).chunk(2)
        y[t] += weights[t, k] * (torch.nn.functional.silu(gate) * up @ w_out[ids[t, k]].double())
    return y


def check(values):
    y, truth = moe_mlp(*values), choice_by_choice(*values)
    assert y.dtype == values[0].dtype
    assert y.shape == truth.shape
    size = truth.norm()
    if 1 in values[-1].shape[1:]:  # of one input or one hidden unit all may be near 0, but not its rounding
        size = max(size, truth.numel() ** 0.5 / 2)
    assert (y.double() - truth).norm() <= BOUNDS[y.dtype] * size


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_kept_choice_adds_its_experts_output(form, shape, dtype):
    check(make(*shape, dtype=dtype))


def test_without_a_mask_every_choice_is_kept(form):
    values = list(make(*SHAPES["odd sizes"]))
    values[3] = None
    check(values)


def test_a_choice_that_is_not_kept_may_have_any_id(form):
    values = make(*SHAPES["past a tile"])
    values[1][~values[3]] = 1 << 40
    truth = choice_by_choice(*values)
    assert (moe_mlp(*values).double() - truth).norm() < 1e-6 * truth.norm()
    values[3].fill_(False)
    assert moe_mlp(*values).abs().max() == 0


def test_all_rows_may_go_to_one_expert(form):
    values = make(*SHAPES["past a tile"])
    values[1].fill_(1)
    check(values)


def test_a_token_that_is_not_finite_spoils_no_other(form):
    values = make(*SHAPES["past a tile"], dtype=torch.bfloat16)
    values[3].fill_(True)
    clean, others = moe_mlp(*values), torch.arange(40) != 7
    values[0][7, 3] = torch.nan
    y = moe_mlp(*values)
    assert y[7].isnan().all()
    assert torch.equal(y[others], clean[others])


def test_autocast_casts_rows_and_weights(form):
    values = make(*SHAPES["all experts"])
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_mlp(*values)
    x, ids, weights, kept, w_in, w_out = values
    assert torch.equal(y, moe_mlp(x.bfloat16(), ids, weights, kept, w_in.bfloat16(), w_out.bfloat16()))


def test_gradients_are_those_of_the_reference(form):
    values = make(*SHAPES["all experts"])
    floats = [values[i].requires_grad_() for i in (0, 2, 4, 5)]
    with torch.enable_grad():
        found = torch.autograd.grad(moe_mlp(*values).square().sum(), floats)
        with using("reference"):
            truth = torch.autograd.grad(moe_mlp(*values).square().sum(), floats)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("hidden", [1, 32, 95, 130])
@pytest.mark.parametrize("width", [1, 31, 64, 513, 2080])
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 17, 65])
def test_shape_grid(form, tokens, width, hidden, dtype):
    check(make(tokens, 2, 3, width, hidden, dtype=dtype))
