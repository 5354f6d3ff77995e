"""The noise of noisy top-k: normal with a learned deviation, one draw a token and expert, none in evaluation."""

import torch

from turnout.moe import MoEConfig, RouteContext
from turnout.moe.routing.registry import build_router


def make(experts, layer=0):
    """A router in training whose logits are its input."""
    cfg = MoEConfig(width=experts, expert_width=4, num_experts=experts, router="noisy_topk", capacity_factor=None)
    module = build_router(cfg, layer)
    module.weight.data = torch.eye(experts)
    return module


def test_first_choices_of_a_noisy_router_are_spread():
    cfg = MoEConfig(width=6, expert_width=4, num_experts=8, router="noisy_topk", capacity_factor=None)
    module, tokens = build_router(cfg), 4000
    assert not any(parameter.any() for parameter in module.parameters())
    routing = module(torch.randn(tokens, 6), RouteContext(seed=1))
    share = routing.counts_E / (2 * tokens)
    assert (share - 1 / 8).abs().max() < 5 * (1 / 8 * 7 / 8 / tokens) ** 0.5
    assert torch.equal(routing.probs_TE, torch.full((tokens, 8), 1 / 8))
    assert module.eval()(torch.randn(9, 6), RouteContext()).ids_TK.tolist() == [[0, 1]] * 9


def test_noise_is_normal_with_the_learned_deviation():
    module = make(3)
    module.noise_weight.data = torch.diag(torch.tensor([-2.0, 0.0, 3.0]))
    scores = module.score(torch.ones(20_000, 3), RouteContext(seed=2))
    deviation = torch.tensor([-2.0, 0.0, 3.0]).exp().log1p()
    torch.testing.assert_close(scores.noise, deviation.expand(20_000, 3))
    noise = scores.rank - scores.logits
    torch.testing.assert_close(noise.std(0), deviation, rtol=0.03, atol=0)
    assert (noise.mean(0).abs() < 5 * deviation / 20_000**0.5).all()
    correlation = torch.corrcoef(noise.T) - torch.eye(3)
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_noise_sleeps_in_evaluation():
    module = make(4).eval()
    module.noise_weight.data.fill_(5.0)
    logits = torch.arange(12.0).view(3, 4)
    scores = module.score(logits, RouteContext())
    assert scores.noise is None
    assert scores.rank is scores.logits
    routings = [module(logits, RouteContext(seed=seed)) for seed in (1, 2)]
    assert torch.equal(routings[0].weights_TK, routings[1].weights_TK)


def test_noise_is_keyed_by_the_global_token():
    module, x = make(4), torch.zeros(40, 4)
    whole = module(x, RouteContext(seed=1, step=2))
    parts = [
        module(x[a:b], RouteContext(seed=1, step=2, index_T=torch.arange(a, b))) for a, b in ((0, 7), (7, 8), (8, 40))
    ]
    assert torch.equal(torch.cat([part.weights_TK for part in parts]), whole.weights_TK)
    assert torch.equal(torch.cat([part.ids_TK for part in parts]), whole.ids_TK)
    assert torch.equal(module(x, RouteContext(seed=1, step=2)).weights_TK, whole.weights_TK)
    for key in (
        {"seed": 2, "step": 2},
        {"seed": 1, "step": 3},
        {"seed": 1, "step": 2, "index_T": torch.arange(40) + 1},
    ):
        assert not torch.equal(module(x, RouteContext(**key)).weights_TK, whole.weights_TK)
    other = make(4, layer=1)
    assert not torch.equal(other(x, RouteContext(seed=1, step=2)).weights_TK, whole.weights_TK)
