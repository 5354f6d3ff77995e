"""The loss-free bias: small updates by hand, what it may touch, and that it balances."""

import pytest
import torch

from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.moe.routing.bias import update_bias, update_biases
from turnout.moe.routing.registry import build_router


def updated(counts, rate=0.25, bias=None):
    bias = torch.zeros(len(counts)) if bias is None else torch.tensor(bias)
    update_bias(bias, torch.as_tensor(counts), rate)
    return bias.tolist()


@pytest.mark.parametrize(
    ("counts", "bias"),
    [
        ([5, 1], [-0.25, 0.25]),
        ([0, 4, 4, 0], [0.25, -0.25, -0.25, 0.25]),
        ([4, 1, 1, 2], [-0.3125, 0.1875, 0.1875, -0.0625]),  # mean 2: signs -, +, +, 0, whose own mean is 1 / 4
        ([8, 0, 0, 0], [-0.375, 0.125, 0.125, 0.125]),  # one crowded expert: the others rise together, centred
        ([1, 1, 1, 2], [0.125, 0.125, 0.125, -0.375]),  # mean 5 / 4 is no integer
    ],
)
def test_bias_moves_by_the_sign_of_the_missing_load_and_is_centred(counts, bias):
    assert updated(counts) == bias


@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [0, 0, 0, 0], [7]])
def test_an_even_load_moves_nothing(counts):
    assert updated(counts) == [0.0] * len(counts)
    centred = [0.5, -0.25, -0.5, 0.25][: len(counts)] if len(counts) > 1 else [0.0]
    assert updated(counts, bias=centred) == centred


def test_a_bias_from_elsewhere_is_centred_and_no_rate_moves_nothing():
    assert updated([2, 2], bias=[1.5, 0.5]) == [0.5, -0.5]
    assert updated([9, 0], rate=0.0, bias=[0.5, -0.5]) == [0.5, -0.5]


def test_counts_are_compared_exactly_however_large():
    counts = torch.full((4,), 2**40)
    counts[0] += 1
    assert updated(counts) == [-0.375, 0.125, 0.125, 0.125]


def test_the_sum_stays_zero_over_many_steps():
    bias, generator = torch.zeros(64), torch.Generator().manual_seed(0)
    for _ in range(500):
        update_bias(bias, torch.randint(0, 50, (64,), generator=generator), 1e-3)
    assert bias.abs().max() > 1e-3
    assert abs(bias.sum()) < 1e-5


# In a model -----------------------------------------------------------------------------------------------------------


def config(**changes):
    settings = {"width": 8, "expert_width": 4, "num_experts": 8, "top_k": 2, "router": "deepseek_v3"}
    return MoEConfig(**settings | {"init_scale": 4.0, "bias_rate": 1e-2, "capacity_factor": None} | changes)


def test_every_router_takes_its_own_layers_counts():
    model = torch.nn.ModuleList([MoE(config(), layer=1), MoE(config(), layer=3), MoE(config(bias_rate=0.0), layer=4)])
    crowded = torch.tensor([8, 0, 0, 0, 0, 0, 0, 0])
    update_biases(model, {1: crowded, 3: crowded.flip(0)})
    first, second, still = (layer.router.balance_bias for layer in model)
    assert first.argmin() == 0
    assert torch.equal(second, first.flip(0))
    assert not still.any()
    with pytest.raises(KeyError):
        update_biases(model, {1: crowded})


def test_models_without_a_bias_are_left_alone():
    update_biases(torch.nn.ModuleList([MoE(MoEConfig(width=4, expert_width=4, router="switch"))]), {})


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_the_buffer_stays_float32_and_is_saved(cast):
    layer = MoE(config())
    update_bias(layer.router.balance_bias, torch.arange(8), 1e-3)
    before = layer.router.balance_bias.clone()
    getattr(layer, cast)()
    assert layer.router.balance_bias.dtype == torch.float32
    assert torch.equal(layer.router.balance_bias, before)
    assert torch.equal(layer.state_dict()["router.balance_bias"], before)
    assert "router.balance_bias" not in dict(layer.named_parameters())


@pytest.mark.parametrize("top_k", [2, 8])
def test_bias_moves_the_selection_and_no_weight(top_k):
    router = build_router(config(top_k=top_k)).train()
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    before = router(x, RouteContext())
    router.balance_bias[:] = torch.linspace(-0.5, 0.5, 8)
    after = router(x, RouteContext())
    assert torch.equal(after.probs_TE, before.probs_TE)
    scores = after.logits_TE.sigmoid().gather(1, after.ids_TK)
    torch.testing.assert_close(after.weights_TK, scores / scores.sum(-1, keepdim=True))
    assert (after.counts_E[-1] > before.counts_E[-1]) == (top_k < 8)


def test_a_constant_added_to_the_bias_changes_no_choice():
    router = build_router(config(expert_groups=4, top_groups=2)).train()
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    router.balance_bias[:] = torch.arange(8) / 64
    before = router(x, RouteContext()).ids_TK
    router.balance_bias += 0.5
    assert torch.equal(router(x, RouteContext()).ids_TK, before)


def test_updates_balance_a_crooked_router():
    router = build_router(config()).train()
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1)) + 1
    spread = []
    for _ in range(150):
        counts = router(x, RouteContext()).counts_E
        spread.append(float(counts.double().std() / counts.double().mean()))
        update_biases(router, {0: counts})
    assert spread[0] > 0.4
    assert max(spread[-10:]) < 0.15
