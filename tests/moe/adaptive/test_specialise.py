"""The measures of specialisation on mixtures whose answer is known."""

import pytest
import torch

from turnout.moe.adaptive import measure

SURE = 50.0  # a logit that leaves the others nothing
TARGETS = torch.eye(4).repeat(5, 1)  # 20 cases, four classes in turn


def right(experts: int) -> torch.Tensor:
    return TARGETS[:, None].expand(20, experts, 4)


def test_one_right_expert_a_class_is_full_specialisation():
    found = measure(right(4), SURE * TARGETS, TARGETS)
    assert found.blend_accuracy == found.alone_accuracy == found.largest_gate == 1
    assert found.blend_error == found.alone_error == 0
    assert found.experts_a_case == pytest.approx(1)
    assert found.experts_used == 4
    assert found.information == pytest.approx(2)  # bits: log2 of four classes


def test_an_even_gate_shares_every_case_and_tells_nothing():
    found = measure(right(4), torch.zeros(20, 4), TARGETS)
    assert found.largest_gate == pytest.approx(0.25)
    assert found.experts_a_case == pytest.approx(4)
    assert found.experts_used == 1  # ties go to the lowest index
    assert found.information == 0


def test_experts_that_only_add_up_are_worth_nothing_alone():
    halves = torch.stack([2 * TARGETS + 3, torch.full((20, 4), -3.0)], 1)
    halves[:, 0, 3] += 10  # the first alone always says class 3; the second takes it back
    halves[:, 1, 3] -= 10
    found = measure(halves, torch.tensor([[1e-4, 0.0]]).expand(20, 2), TARGETS)
    assert found.blend_accuracy == 1
    assert found.blend_error < 1e-3
    assert found.alone_accuracy == 0.25
    assert found.alone_error > 100


def test_two_experts_for_two_pairs_of_classes_are_one_bit():
    pair = torch.tensor([[SURE, 0.0], [SURE, 0.0], [0.0, SURE], [0.0, SURE]]).repeat(5, 1)
    found = measure(right(2), pair, TARGETS)
    assert found.experts_used == 2
    assert found.information == pytest.approx(1)


def test_an_expert_chosen_for_two_cases_in_a_hundred_is_not_used():
    targets = torch.eye(4).repeat(25, 1)
    logits = torch.tensor([SURE, 0.0]).repeat(100, 1)
    logits[:2] = torch.tensor([0.0, SURE])
    assert measure(targets[:, None].expand(100, 2, 4), logits, targets).experts_used == 1
    logits[2] = torch.tensor([0.0, SURE])
    assert measure(targets[:, None].expand(100, 2, 4), logits, targets).experts_used == 2
