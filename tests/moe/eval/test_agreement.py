"""The share of choices that two models make alike."""

import torch

from turnout.moe.eval.agreement import agreement
from turnout.moe.routing.record import Routing


def routing(ids, wanted=None) -> Routing:
    ids_TK = torch.tensor(ids)
    wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool) if wanted is None else torch.tensor(wanted)
    weights_TK, logits_TE = torch.ones(ids_TK.shape), torch.zeros(len(ids), 4)
    return Routing(ids_TK=ids_TK, weights_TK=weights_TK, wanted_TK=wanted_TK, kept_TK=wanted_TK, logits_TE=logits_TE)


def test_choices_count_in_whatever_order_and_only_of_valid_tokens():
    ours, theirs = routing([[0, 1], [2, 3], [0, 1]]), routing([[1, 0], [2, 1], [3, 2]])
    assert agreement([ours], [theirs], [torch.tensor([True, True, False])]) == 0.75
    assert agreement([ours], [theirs], [torch.tensor([True, True, True])]) == 0.5
    assert agreement([ours], [theirs], [torch.tensor([False, False, False])]) == 1.0


def test_what_nobody_asked_for_does_not_count():
    ours, theirs = routing([[0, 1]], [[True, False]]), routing([[0, 1]], [[True, True]])
    assert agreement([ours], [theirs], [torch.tensor([True])]) == 0.5
    assert agreement([theirs], [ours], [torch.tensor([True])]) == 1.0
