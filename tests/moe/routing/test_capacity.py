"""Capacity in exact integers, and who gets a slot: hand-made cases and a loop as the oracle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.moe.routing.capacity import capacity, keep_within_capacity

ORDERS = ("token_major", "choice_major")


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "least", "slots"),
    [
        (100, 2, 8, 1.25, 4, 32),
        (100, 1, 2, 1.1, 4, 55),  # 1.1 * 100 / 2 is 55.00000000000001 in floats
        (1000, 2, 8, 1.0, 4, 250),
        (10, 1, 8, 1.25, 4, 4),  # raised to the least
        (10, 1, 8, 1.25, 0, 2),
        (3, 1, 8, 1.25, 4, 3),  # never more than the tokens
        (100, 1, 8, 100.0, 4, 100),
        (0, 2, 8, 1.25, 4, 0),
        (1, 1, 1, 1.0, 0, 1),
        (10**9, 2, 7, 1.3, 4, 371_428_572),
        (7, 2, 3, 0.1, 0, 1),
    ],
)
def test_capacity_is_exact(tokens, top_k, experts, factor, least, slots):
    assert capacity(tokens, top_k, experts, factor, least) == slots
    many = capacity(torch.tensor([tokens, tokens]), top_k, experts, factor, least)
    assert many.tolist() == [slots, slots]
    assert many.dtype == torch.int64


def keep(ids, capacity_of, order="token_major", wanted=None, groups=None, experts=4):
    ids = torch.tensor(ids)
    wanted = torch.ones_like(ids, dtype=torch.bool) if wanted is None else torch.tensor(wanted)
    groups = torch.zeros(len(ids), dtype=torch.int64) if groups is None else torch.tensor(groups)
    return keep_within_capacity(ids, wanted, groups, torch.tensor(capacity_of), experts, order).int().tolist()


def test_earlier_tokens_keep_their_slot():
    assert keep([[1], [1], [0], [1]], [2]) == [[1], [1], [1], [0]]


def test_the_orders_differ_where_a_later_first_choice_meets_an_earlier_second_choice():
    ids = [[0, 1], [1, 0], [1, 2]]
    assert keep(ids, [1], "token_major") == [[1, 1], [0, 0], [0, 1]]
    assert keep(ids, [1], "choice_major") == [[1, 0], [1, 0], [0, 1]]


def test_groups_have_their_own_slots():
    assert keep([[0], [0], [0], [0]], [1, 2], groups=[0, 0, 1, 1]) == [[1], [0], [1], [1]]


def test_what_does_not_want_a_slot_takes_none():
    assert keep([[0], [0], [0]], [1], wanted=[[False], [True], [True]]) == [[0], [1], [0]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens_keep_nothing(order, top_k):
    none = torch.empty(0, top_k, dtype=torch.int64)
    kept = keep_within_capacity(none, none.bool(), none[:, 0], torch.tensor([0]), 4, order)
    assert kept.shape == (0, top_k)


def test_zero_slots_keep_nothing():
    assert keep([[0], [1]], [0]) == [[0], [0]]


def loop(ids, wanted, groups, slots, order):
    """The definition: walk the assignments in order, take a slot while there is one."""
    tokens, top_k = range(len(ids)), range(len(ids[0]) if ids else 0)
    walk = itertools.product(tokens, top_k) if order == "token_major" else ((t, k) for k in top_k for t in tokens)
    used, kept = {}, [[0] * len(row) for row in ids]
    for t, k in walk:
        queue = groups[t], ids[t][k]
        if wanted[t][k] and used.get(queue, 0) < slots[groups[t]]:
            used[queue] = used.get(queue, 0) + 1
            kept[t][k] = 1
    return kept


@st.composite
def cases(draw):
    experts, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    groups = [g for g, n in enumerate(lengths) for _ in range(n)]
    row = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k)
    flags = st.lists(st.booleans(), min_size=top_k, max_size=top_k)
    ids = draw(st.lists(row, min_size=len(groups), max_size=len(groups)))
    wanted = draw(st.lists(flags, min_size=len(groups), max_size=len(groups)))
    slots = draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    return experts, ids, wanted, groups, slots


@settings(deadline=None, max_examples=150)
@given(cases().filter(lambda case: case[1]), st.sampled_from(ORDERS))
def test_slots_fill_as_the_definition_says(case, order):
    experts, ids, wanted, groups, slots = case
    got = keep(ids, slots, order, wanted, groups, experts)
    assert got == loop(ids, wanted, groups, slots, order)


@settings(deadline=None, max_examples=60)
@given(cases().filter(lambda case: len(case[1]) > 1), st.data())
def test_token_major_looks_at_no_later_token(case, data):
    experts, ids, wanted, groups, slots = case
    cut = data.draw(st.integers(1, len(ids) - 1))
    changed = ids[:cut] + [[(e + 1) % experts for e in row] for row in ids[cut:]]
    assert (
        keep(changed, slots, "token_major", wanted, groups, experts)[:cut]
        == (keep(ids, slots, "token_major", wanted, groups, experts)[:cut])
    )


def test_choice_major_does_look_at_later_tokens():
    assert keep([[0, 1], [2, 3]], [1], "choice_major")[0] == [1, 1]
    assert keep([[0, 1], [1, 3]], [1], "choice_major")[0] == [1, 0]
