"""Every balance loss in closed form, against plain loops and formulas; its gradient attached once.

T tokens, E experts, K choices.
"""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from turnout import ConfigError
from turnout.moe import MoE, MoEConfig, RouteContext
from turnout.moe.routing.losses import attach_loss, smooth_load, weighted_sum
from turnout.moe.routing.router import Scores
from turnout.tests.helpers.losses import LOSSES, OVER, PRODUCTS, SPREADS, Case

# Closed forms ---------------------------------------------------------------------------------------------------------


def even(tokens, experts, top_k):
    """Equal scores without a draw of noise, choices dealt round."""
    logits = torch.zeros(tokens, experts)
    ids = torch.arange(tokens * top_k).view(tokens, top_k) % experts
    scores = Scores(logits=logits, probs=logits.softmax(-1), rank=logits, gates=logits, noise=torch.ones_like(logits))
    return Case(logits, logits, scores, ids, scores.probs.gather(1, ids))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (4, 2), (8, 1), (8, 2), (8, 8)])
def test_a_product_is_exactly_one_when_experts_share_alike(name, experts, top_k, over):
    assert even(8, experts, top_k).loss(name, over).item() == 1.0


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (4, 2), (8, 1), (8, 2)])
def test_a_spread_is_exactly_zero_when_experts_share_alike(name, experts, top_k, over):
    assert even(8, experts, top_k).loss(name, over).item() == 0.0


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (8, 1), (8, 2), (8, 4), (512, 1)])
def test_at_collapse_a_product_is_experts_over_choices_and_importance_one_less(experts, top_k, over):
    logits = torch.full((5, experts), -1e4)
    logits[:, :top_k] = 0
    case = Case.of(logits, ids=torch.arange(top_k).expand(5, top_k))
    for name in PRODUCTS:
        assert case.loss(name, over).item() == pytest.approx(experts / top_k)
    assert case.loss("importance", over).item() == pytest.approx(experts / top_k - 1)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("top_k", [1, 2])
def test_at_collapse_load_is_experts_over_choices_minus_one(top_k, over):
    logits = torch.zeros(7, 6)
    logits[:, :top_k] = 100 * torch.arange(1, top_k + 1)
    assert Case.of(logits, top_k).loss("load", over).item() == pytest.approx(6 / top_k - 1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("experts", [1, 4])
def test_z_is_the_mean_square_of_logsumexp(experts, sign):
    logits = sign * torch.tensor([0.0, 1.0, 5.0])[:, None].expand(3, experts)
    wanted = sum((sign * shift + math.log(experts)) ** 2 for shift in (0, 1)) / 2
    assert Case.of(logits).loss("z", valid=[True, True, False]).item() == pytest.approx(wanted)


def test_balance_is_experts_times_share_times_probability():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    case = Case.of(probs.log(), ids=torch.tensor([[0, 1], [0, 1], [1, 0], [2, 0]]))
    wanted = 3 * (4 / 8 * 1.6 / 4 + 3 / 8 * 1.5 / 4 + 1 / 8 * 0.9 / 4)
    assert case.loss("balance").item() == pytest.approx(wanted)


def test_devices_are_neighbouring_experts():
    case = Case.random(9, 6, 2)
    share = torch.bincount((case.ids // 2).flatten(), minlength=3) / 18
    mean = case.scores.probs.mean(0).view(3, 2).sum(1)
    torch.testing.assert_close(case.loss("device", device_groups=3), 3 * (share * mean).sum())
    assert case.loss("device", device_groups=1).item() == pytest.approx(1.0)


# Derived once more, by loops ------------------------------------------------------------------------------------------


def test_importance_is_shazeer_eq_6_and_7():
    case = Case.random()
    importance = [0.0] * 5
    for token in range(13):
        for choice in range(2):
            importance[case.ids[token, choice]] += case.weights[token, choice].item()
    mean = sum(importance) / 5
    variance = sum((value - mean) ** 2 for value in importance) / 5
    assert case.loss("importance").item() == pytest.approx(variance / mean**2, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_is_shazeer_eq_8_to_11(top_k):
    case = Case.random(top_k=top_k)
    clean, noisy, sigma = (x.detach().numpy() for x in (case.scores.logits, case.scores.rank, case.scores.noise))
    load = np.zeros(5)
    for x in range(13):
        for i in range(5):
            others = sorted((noisy[x, j] for j in range(5) if j != i), reverse=True)
            load[i] += 0.5 * (1 + math.erf((clean[x, i] - others[top_k - 1]) / sigma[x, i] / math.sqrt(2)))
    np.testing.assert_allclose(smooth_load(case.scores, top_k).sum(0).detach(), load, rtol=1e-12)
    assert case.loss("load").item() == pytest.approx(np.var(load) / np.mean(load) ** 2, rel=1e-12)


def test_load_knows_ties_and_a_vanished_noise():
    rank = torch.tensor([[2.0, 2.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    logits, noise = rank.clone().requires_grad_(), torch.zeros(3, 3, requires_grad=True)
    load = smooth_load(Scores(logits=logits, probs=rank, rank=rank, gates=rank, noise=noise), 1)
    assert load.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0.5, 0.5, 0.5]]
    load.sum().backward()
    assert logits.grad.isfinite().all()
    assert noise.grad.isfinite().all()


def test_sequence_loss_is_deepseek_v3_eq_17_to_20():
    s = torch.rand(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, probs = s.topk(2).indices, s / s.sum(-1, keepdim=True)
    total = 0.0
    for row in (range(5), range(5, 12)):
        for i in range(6):
            f = 6 / (2 * len(row)) * sum(i in ids[t].tolist() for t in row)
            mean = sum(float(s[t, i] / s[t].sum()) for t in row) / len(row)
            total += len(row) / 12 * f * mean
    case = Case(s, s, Scores(logits=s.logit(), probs=probs, rank=s, gates=s), ids, probs.gather(1, ids))
    got = case.loss("sequence", "micro_batch", cu_groups=torch.tensor([0, 5, 12]))
    assert got.item() == pytest.approx(total, rel=1e-12)


# What other code prints -----------------------------------------------------------------------------------------------


def test_hugging_face_prints_choices_times_ours():
    case = Case.of(torch.randn(11, 4, generator=torch.Generator().manual_seed(2)), 2, torch.zeros(11, 4))
    theirs = load_balancing_loss_func((case.logits,), 4, 2)
    torch.testing.assert_close(theirs, 2 * case.loss("balance"))


def test_gshards_paper_prints_ours_over_experts_squared():
    case = Case.random(experts=4, top_k=1)
    first_E, mean_E = torch.bincount(case.ids[:, 0], minlength=4), case.scores.probs.mean(0)
    paper = sum(first_E[e] / 13 * mean_E[e] for e in range(4)) / 4  # Algorithm 1, line 15
    # Σ f P of the paper is 1 / E at perfect balance, and its mean over experts 1 / E²
    torch.testing.assert_close(4**2 * paper, case.loss("balance"))


# Gradients ------------------------------------------------------------------------------------------------------------


def plain(name, case):
    """The formulas over all tokens at once, as written."""
    scores, experts = case.scores, case.scores.probs.shape[1]
    chosen_TKE = one_hot(case.ids, experts).double()
    if name == "z":
        return (scores.logits.exp().sum(-1).log() ** 2).mean()
    if name in PRODUCTS:
        return experts * (chosen_TKE.sum((0, 1)) / case.ids.numel() * scores.probs.mean(0)).sum()
    if name == "load":
        rivals = [scores.rank[:, [j for j in range(experts) if j != i]] for i in range(experts)]
        kth = torch.stack([r.sort(descending=True).values[:, case.ids.shape[1] - 1] for r in rivals], dim=1)
        sums = (0.5 + 0.5 * torch.erf((scores.logits - kth) / scores.noise / 2**0.5)).sum(0)
    else:
        sums = torch.einsum("tk,tke->e", case.weights, chosen_TKE)
    return ((sums - sums.mean()) ** 2).mean() / sums.mean() ** 2


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_plain_formula(name, over):
    case = Case.random()
    ours, formula = case.loss(name, over), plain(name, case)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=0)
    torch.testing.assert_close(case.gradient(ours), case.gradient(formula), rtol=1e-10, atol=1e-14)
    assert case.gradient(ours).norm() > 1e-3


def test_load_trains_the_noise_and_a_product_does_not():
    case = Case.random()
    logits = case.logits.numel()
    assert case.gradient(case.loss("load"))[logits:].norm() > 1e-3
    assert case.gradient(case.loss("balance"))[logits:].norm() == 0


def test_balance_pushes_the_crowded_expert_down():
    case = Case.of(torch.zeros(4, 2, requires_grad=True), ids=torch.tensor([[0], [0], [0], [1]]))
    case.loss("balance").backward()
    torch.testing.assert_close(case.logits.grad, torch.tensor([[1.0, -1.0]]).expand(4, 2) / 16)


# Through the layer ----------------------------------------------------------------------------------------------------

COEFFICIENTS = {
    "balance_loss": 0.5, "sequence_loss": 0.25, "global_batch_loss": 2.0, "device_loss": 1.5, "importance_loss": 3.0,
    "z_loss": 0.125,
}  # fmt: skip


def layer_of(**settings):
    torch.manual_seed(0)
    return MoE(MoEConfig(width=4, expert_width=4, num_experts=4, router="switch", init_scale=2.0, **settings))


def router_gradient(**coefficients):
    layer = layer_of(device_groups=2, **{"balance_loss": 0.0, "z_loss": 0.0} | coefficients)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(5))
    y, routing = layer(x, RouteContext(cu_groups=torch.tensor([0, 5, 9])))
    (0 * y).sum().backward()
    return layer.router.weight.grad, routing.aux


def test_losses_add_with_their_coefficients():
    together, aux = router_gradient(**COEFFICIENTS)
    assert set(aux) == {name.removesuffix("_loss") for name in COEFFICIENTS}
    alone = {name: router_gradient(**{name: 1.0})[0] for name in COEFFICIENTS}
    assert all(grad.norm() > 1e-4 for grad in alone.values())
    torch.testing.assert_close(together, sum(c * alone[name] for name, c in COEFFICIENTS.items()))


def test_a_loss_without_a_gradient_is_refused():
    aux = {"balance": torch.ones(()), "z": torch.ones((), requires_grad=True)}
    with pytest.raises(ConfigError, match=r"moe\.balance_loss \(0\.5\) is on, but its loss has no gradient"):
        weighted_sum({"balance": 0.5, "z": 1.0}, aux, learns=True)
    assert weighted_sum({"balance": 0.5, "z": 1.0}, aux, learns=False).item() == 1.5
    assert weighted_sum({"balance": 0.0, "z": 2.0}, aux, learns=True).item() == 2.0
    assert weighted_sum({"balance": 0.0}, aux, learns=True) is None
    with pytest.raises(KeyError):
        weighted_sum({"device": 1.0}, aux, learns=True)


def test_a_router_whose_scores_are_cut_off_is_refused():
    layer, x = layer_of(), torch.randn(9, 4)
    whole = layer.router.logits
    layer.router.logits = lambda x_TD: whole(x_TD).detach()
    with torch.no_grad():
        layer(x)
    with pytest.raises(ConfigError, match=r"moe\.balance_loss"):
        layer(x)


def test_the_losses_of_a_frozen_router_still_train_what_feeds_it():
    layer, x = layer_of(), torch.randn(9, 4, requires_grad=True)
    layer.router.requires_grad_(False)
    (0 * layer(x)[0]).sum().backward()
    assert x.grad.norm() > 0
    assert layer.router.weight.grad is None


def test_attached_loss_leaves_the_value_and_gets_gradient_one_each_time():
    x, w = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = attach_loss(x, w.square())
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 10.0, 100.0])).sum().backward(retain_graph=True)
    assert w.grad.item() == 4.0  # d w² / dw, whatever the gradient of y
    assert x.grad.tolist() == [1.0, 10.0, 100.0]
    y.sum().backward()
    assert w.grad.item() == 8.0
