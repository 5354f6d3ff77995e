"""Balance and z losses in closed form, and their gradient attached exactly once."""

import pytest
import torch

from turnout.moe.routing.losses import attach_loss, router_z, switch_balance


def balance(probs, ids, valid=None, groups=None, total=None):
    probs, ids = torch.as_tensor(probs), torch.as_tensor(ids)
    valid = torch.ones(len(ids), dtype=torch.bool) if valid is None else torch.tensor(valid)
    groups = torch.zeros(len(ids), dtype=torch.int64) if groups is None else torch.tensor(groups)
    count = int(groups.max()) + 1
    return switch_balance(probs, ids, valid, groups, count, int(valid.sum()) if total is None else total)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [1, 2, 4, 8])
def test_balance_is_exactly_one_when_experts_share_alike(experts, top_k):
    ids = torch.arange(8 * top_k).view(8, top_k) % experts
    assert balance(torch.full((8, experts), 1 / experts), ids).item() == 1.0


@pytest.mark.parametrize("experts", [1, 2, 8, 512])
def test_balance_is_the_number_of_experts_at_collapse(experts):
    probs = torch.zeros(5, experts)
    probs[:, 0] = 1
    assert balance(probs, torch.zeros(5, 1, dtype=torch.int64)).item() == experts


def test_balance_is_experts_times_share_times_probability():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    ids = torch.tensor([[0, 1], [0, 1], [1, 0], [2, 0]])
    share, mean = torch.tensor([4, 3, 1]) / 8, probs.mean(0)
    torch.testing.assert_close(balance(probs, ids), 3 * (share * mean).sum())


def test_groups_are_weighted_by_their_valid_tokens():
    torch.manual_seed(0)
    probs, ids = torch.randn(7, 3).softmax(-1), torch.randint(0, 3, (7, 1))
    valid, groups = [True] * 4 + [False] + [True] * 2, [0, 0, 0, 0, 1, 1, 1]
    got = balance(probs, ids, valid, groups)
    parts = 4 * balance(probs[:4], ids[:4]) + 2 * balance(probs[5:], ids[5:])
    torch.testing.assert_close(got, parts / 6)


def test_a_group_without_valid_tokens_adds_nothing():
    probs, ids = torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0], [1]])
    both = balance(probs, ids, [True, False], [0, 1])
    torch.testing.assert_close(both, balance(probs[:1], ids[:1]))


def test_balance_pushes_the_crowded_expert_down():
    logits = torch.zeros(4, 2, requires_grad=True)
    balance(logits.softmax(-1), torch.tensor([[0], [0], [0], [1]])).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0]]).expand(4, 2) / 16)


def test_z_is_the_mean_square_of_logsumexp():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    log2 = torch.tensor(2.0).log()
    valid = torch.tensor([True, True, False])
    torch.testing.assert_close(router_z(logits, valid, 2), (log2**2 + (1 + log2) ** 2) / 2)
    assert router_z(torch.tensor([[0.0], [-0.0]]), valid[:2], 2) == 0


def test_attached_loss_leaves_the_value_and_gets_gradient_one_each_time():
    x, w = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = attach_loss(x, w.square())
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 10.0, 100.0])).sum().backward(retain_graph=True)
    assert w.grad.item() == 4.0  # d w² / dw, whatever the gradient of y
    assert x.grad.tolist() == [1.0, 10.0, 100.0]
    y.sum().backward()
    assert w.grad.item() == 8.0
