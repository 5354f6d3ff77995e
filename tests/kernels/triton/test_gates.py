"""A router's decision in Triton: the reference's experts, and its weights and gradients in float64."""

import pytest
import torch

from turnout import kernels
from turnout.kernels import registry

RULES = {
    "softmax": {},
    "renormalised": {"renormalize": True},
    "chosen": {"score": "chosen", "scale": 1.5},
    "sigmoid": {"score": "sigmoid"},
    "biased": {"score": "sigmoid", "bias": True, "renormalize": True, "scale": 2.5},
    "groups": {"groups": 4, "top_groups": 2, "scale": 16.0},
    "pairs of groups": {"groups": 3, "top_groups": 2, "best": 2, "score": "sigmoid", "bias": True, "renormalize": True},
}


def tied(T, E):
    """Logits of few different values, so that many are alike; some are not finite."""
    logits = (torch.randn(T, E) * 2).bfloat16().float()
    if T > 5 and E > 6:
        logits[2, 5], logits[3, 2] = torch.inf, torch.nan
        logits[4, : E - 1], logits[5] = -torch.inf, 0.0
        logits[5, 1] = -0.0
    return logits


def check(T, E, K, name):
    rule = dict(RULES[name])
    if rule.pop("bias", False):
        rule["bias_E"] = torch.linspace(-1, 1, E)
    logits = tied(T, E).requires_grad_()
    with kernels.using("reference"):
        wanted, _ = kernels.top_k_gates(logits, K, **rule)
        exact = logits.detach().double().requires_grad_()
        truth = kernels.top_k_gates(exact, K, **rule | {"ids_TK": wanted})[1]
    with kernels.using("triton"):
        assert registry.choose("top_k_gates", logits, K, **rule) == "triton"
        ids, weights = kernels.top_k_gates(logits, K, **rule)
        again, known = kernels.top_k_gates(logits, K, **rule, ids_TK=wanted)
    assert torch.equal(ids, wanted)
    assert torch.equal(again, wanted)
    assert torch.equal(known.detach().nan_to_num(-1), weights.detach().nan_to_num(-1))
    torch.testing.assert_close(weights.double(), truth, rtol=3e-6, atol=1e-7, equal_nan=True)
    grad = torch.randn(T, K)
    (found,) = torch.autograd.grad(weights, logits, grad)
    (through,) = torch.autograd.grad(truth, exact, grad.double())
    finite = logits.detach().isfinite().all(1)
    assert not ids.requires_grad
    torch.testing.assert_close(found.double()[finite], through[finite], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_the_choice_is_the_references_and_so_nearly_are_the_weights(name):
    check(9, 12, 3, name)


def test_a_nan_ranks_above_all_and_spoils_its_own_row():
    logits = torch.zeros(3, 40)
    logits[1, 33] = torch.nan
    with kernels.using("triton"):
        ids, weights = kernels.top_k_gates(logits, 2)
    assert ids.tolist() == [[0, 1], [33, 0], [0, 1]]
    assert weights.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_a_row_has_the_same_bits_alone_and_in_any_batch():
    logits = torch.randn(70, 20)
    with kernels.using("triton"):
        _, together = kernels.top_k_gates(logits, 5, renormalize=True)
        _, alone = kernels.top_k_gates(logits[65:66], 5, renormalize=True)
    assert torch.equal(alone, together[65:66])


@pytest.mark.full
@pytest.mark.parametrize(
    ("T", "E", "K"), [(0, 12, 2), (1, 12, 1), (65, 36, 12), (130, 60, 6), (7, 384, 8), (9, 516, 16)]
)
@pytest.mark.parametrize("name", RULES)
def test_grid(name, T, E, K):
    check(T, E, K, name)


@pytest.mark.full
@pytest.mark.parametrize("E", [1, 33])
@pytest.mark.parametrize("name", ["softmax", "renormalised", "chosen", "sigmoid", "biased"])
def test_all_experts_may_be_chosen(name, E):
    check(9, E, E, name)
