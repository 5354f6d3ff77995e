"""Capacity in exact integers, and who gets a slot: hand-made cases and a loop as the oracle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnout.kernels.random import DROP_ORDER
from turnout.moe.routing.capacity import Room, capacity, keep

NEVER = float("-inf")
ORDERS = ("token_major", "choice_major", "probability", "random")


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


def fill(ids, slots, order="token_major", *, wanted=None, groups=None, experts=4, gates=None, draws=None, reroute=0):
    """(ids, kept) as lists; `slots` of each expert by group, `gates` [T, E] also rank the experts."""
    ids = torch.tensor(ids)
    wanted = torch.ones_like(ids, dtype=torch.bool) if wanted is None else torch.tensor(wanted)
    groups = torch.zeros(len(ids), dtype=torch.int64) if groups is None else torch.tensor(groups)
    gates = torch.zeros(len(ids), experts) if gates is None else torch.tensor(gates)
    room = Room(groups, torch.tensor(slots)[:, None].expand(-1, experts))

    def draw(purpose):
        assert (order, purpose) == ("random", DROP_ORDER)
        return torch.tensor(draws)

    out, kept = keep(ids, wanted, room, order=order, gates_TE=gates, rank_TE=gates, reroute=reroute, draw=draw)
    return out.tolist(), kept.int().tolist()


def kept_of(*args, **settings):
    return fill(*args, **settings)[1]


def test_earlier_tokens_keep_their_slot():
    assert kept_of([[1], [1], [0], [1]], [2]) == [[1], [1], [1], [0]]


def test_the_orders_differ_where_a_later_first_choice_meets_an_earlier_second_choice():
    ids = [[0, 1], [1, 0], [1, 2]]
    assert kept_of(ids, [1], "token_major") == [[1, 1], [0, 0], [0, 1]]
    assert kept_of(ids, [1], "choice_major") == [[1, 0], [1, 0], [0, 1]]


def test_the_highest_gates_keep_their_slot_and_earlier_tokens_win_ties():
    gates = [[0.5, 0.3, 0.0, 0.0], [0.7, 0.2, 0.0, 0.0], [0.5, 0.3, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0]]
    ids = [[0, 1], [0, 1], [0, 1], [1, 0]]
    assert kept_of(ids, [2], "probability", gates=gates) == [[1, 1], [1, 0], [0, 0], [1, 0]]
    assert kept_of(ids, [1], "probability", gates=gates) == [[0, 0], [1, 0], [0, 0], [1, 0]]


def test_the_lowest_draws_keep_their_slot_and_earlier_tokens_win_ties():
    draws = [[0.5, 0.9], [0.1, 0.3], [0.5, 0.3]]
    assert kept_of([[0, 1]] * 3, [1], "random", draws=draws) == [[0, 0], [1, 1], [0, 0]]
    assert kept_of([[0, 1]] * 3, [2], "random", draws=draws) == [[1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("order", ORDERS)
def test_groups_have_their_own_slots(order):
    flat = {"gates": [[0.0] * 4] * 4, "draws": [[0.0]] * 4}
    assert kept_of([[0]] * 4, [1, 2], order, groups=[0, 0, 1, 1], **flat) == [[1], [0], [1], [1]]


@pytest.mark.parametrize("order", ORDERS)
def test_what_does_not_want_a_slot_takes_none(order):
    wanted = [[False], [True], [True]]
    assert kept_of([[0]] * 3, [1], order, wanted=wanted, draws=[[0.0]] * 3) == [[0], [1], [0]]


@pytest.mark.parametrize("reroute", [0, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens_keep_nothing(order, top_k, reroute):
    none, gates = torch.empty(0, top_k, dtype=torch.int64), torch.empty(0, 4)
    room = Room(none[:, 0], torch.zeros(1, 4, dtype=torch.int64))
    settings = {"gates_TE": gates, "rank_TE": gates, "reroute": reroute, "draw": lambda purpose: torch.empty(0, top_k)}
    ids, kept = keep(none, none.bool(), room, order=order, **settings)
    assert ids.shape == kept.shape == (0, top_k)


def test_zero_slots_keep_nothing():
    assert kept_of([[0], [1]], [0]) == [[0], [0]]
    assert fill([[0], [1]], [0], reroute=3) == ([[0], [1]], [[0], [0]])


def test_a_dropped_token_is_retried_at_its_next_best_expert():
    gates = [[0.9, 0.5, 0.1, 0.0]] * 5
    assert fill([[0]] * 5, [1], gates=gates, reroute=0)[1] == [[1], [0], [0], [0], [0]]
    assert fill([[0]] * 5, [1], gates=gates, reroute=1) == ([[0], [1], [0], [0], [0]], [[1], [1], [0], [0], [0]])
    # each round the tokens that are left ask one expert further down; the last finds none and keeps its first wish
    assert fill([[0]] * 5, [1], gates=gates, reroute=3) == ([[0], [1], [2], [3], [0]], [[1], [1], [1], [1], [0]])


def test_a_retry_takes_only_what_first_wishes_left():
    gates = [[0.9, 0.5, 0.1, 0.0], [0.9, 0.5, 0.1, 0.0], [0.1, 0.9, 0.0, 0.0]]
    assert fill([[0], [0], [1]], [1], gates=gates, reroute=1) == ([[0], [0], [1]], [[1], [0], [1]])
    assert fill([[0], [0], [1]], [1], gates=gates, reroute=2) == ([[0], [2], [1]], [[1], [1], [1]])


def test_two_drops_of_one_token_ask_different_experts_and_ties_go_to_the_lower():
    ids, flat = [[0, 1], [0, 1]], [[0.5, 0.5, 0.2, 0.2]] * 2
    assert fill(ids, [1], gates=flat, reroute=1) == ([[0, 1], [2, 3]], [[1, 1], [1, 1]])
    # three experts: one is left for the two dropped choices, the first of them asks it
    three = [[0.5, 0.5, 0.2]] * 2
    assert fill(ids, [1], gates=three, experts=3, reroute=2) == ([[0, 1], [2, 1]], [[1, 1], [1, 0]])


def test_an_expert_whose_choice_was_not_drawn_is_not_asked_again():
    wanted = [[True, False], [True, False]]
    gates = [[0.9, 0.5, 0.1]] * 2
    assert fill([[0, 1]] * 2, [1], gates=gates, experts=3, wanted=wanted, reroute=1) == ([[0, 1], [2, 1]], [[1, 0]] * 2)


def test_an_expert_of_rank_minus_infinity_is_never_asked():
    gates = [[0.9, NEVER, 0.1, NEVER]] * 4
    assert fill([[0]] * 4, [1], gates=gates, reroute=3) == ([[0], [2], [0], [0]], [[1], [1], [0], [0]])


def test_retries_are_served_in_the_same_order():
    gates = [[0.9, 0.3, 0.0, 0.0], [0.9, 0.5, 0.0, 0.0], [0.95, 0.4, 0.0, 0.0]]
    draws = [[0.6], [0.7], [0.1]]
    assert fill([[0]] * 3, [1], gates=gates, reroute=1)[0] == [[0], [1], [0]]
    assert fill([[0]] * 3, [1], "probability", gates=gates, reroute=1)[0] == [[0], [1], [0]]
    assert fill([[0]] * 3, [1], "random", gates=gates, draws=draws, reroute=1)[0] == [[1], [0], [0]]


def walk(ids, slots, order, *, wanted, groups, experts, gates, draws, reroute):
    """The definition: serve the assignments one by one, take a slot while there is one, then ask the next best."""
    ids, kept = [list(row) for row in ids], [[0] * len(row) for row in ids]
    asked, used = [set(row) for row in ids], {}

    def served(asking):  # (token, choice) → expert
        key = {
            "token_major": lambda t, k: (t, k),
            "choice_major": lambda t, k: (k, t),
            "probability": lambda t, k: (-gates[t][asking[t, k]], t, k),
            "random": lambda t, k: (draws[t][k], t, k),
        }[order]
        for t, k in sorted(asking, key=lambda place: key(*place)):
            queue = groups[t], asking[t, k]
            if used.get(queue, 0) < slots[groups[t]]:
                used[queue] = used.get(queue, 0) + 1
                kept[t][k], ids[t][k] = 1, asking[t, k]

    served({(t, k): e for t, row in enumerate(ids) for k, e in enumerate(row) if wanted[t][k]})
    for _ in range(reroute):
        asking = {}
        for t, row in enumerate(ids):
            for k in range(len(row)):
                fresh = sorted(set(range(experts)) - asked[t], key=lambda e: (-gates[t][e], e))
                fresh = [e for e in fresh if gates[t][e] > NEVER]
                if wanted[t][k] and not kept[t][k] and fresh:
                    asking[t, k] = fresh[0]
                    asked[t].add(fresh[0])
        served(asking)
    return ids, kept


@st.composite
def cases(draw):
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(3, experts)))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3).filter(any))
    groups = [g for g, n in enumerate(lengths) for _ in range(n)]

    def table(cell, columns):
        return draw(
            st.lists(st.lists(cell, min_size=columns, max_size=columns), min_size=len(groups), max_size=len(groups))
        )

    few = st.sampled_from([0.0, 0.25, 0.5, 0.75, NEVER])  # many ties
    ids = [draw(st.permutations(range(experts)))[:top_k] for _ in groups]
    slots = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    settings = {
        "wanted": table(st.booleans(), top_k), "groups": groups, "experts": experts,
        "gates": table(few, experts), "draws": table(few, top_k), "reroute": draw(st.integers(0, 3)),
    }  # fmt: skip
    return ids, slots, settings


@settings(deadline=None, max_examples=200)
@given(cases(), st.sampled_from(ORDERS))
def test_slots_fill_as_the_definition_says(case, order):
    ids, slots, given = case
    assert fill(ids, slots, order, **given) == walk(ids, slots, order, **given)


@settings(deadline=None, max_examples=100)
@given(cases(), st.sampled_from(ORDERS))
def test_rerouting_only_adds_and_never_exceeds_the_slots(case, order):
    ids, slots, given = case
    out, kept = fill(ids, slots, order, **given)
    first = kept_of(ids, slots, order, **given | {"reroute": 0})
    used = {}
    for t, k in itertools.product(range(len(ids)), range(len(ids[0]))):
        assert kept[t][k] >= first[t][k]
        assert kept[t][k] or out[t][k] == ids[t][k]
        used[given["groups"][t], out[t][k]] = used.get((given["groups"][t], out[t][k]), 0) + kept[t][k]
    assert all(n <= slots[group] for (group, _), n in used.items())
    assert all(len(set(row)) == len(row) for row in out)


@settings(deadline=None, max_examples=60)
@given(cases().filter(lambda case: len(case[0]) > 1), st.data())
def test_token_major_looks_at_no_later_token(case, data):
    ids, slots, given = case
    given = given | {"reroute": 0}
    cut = data.draw(st.integers(1, len(ids) - 1))
    changed = ids[:cut] + [[(e + 1) % given["experts"] for e in row] for row in ids[cut:]]
    assert kept_of(changed, slots, **given)[:cut] == kept_of(ids, slots, **given)[:cut]


def test_the_other_orders_do_look_at_later_tokens():
    assert kept_of([[0, 1], [2, 3]], [1], "choice_major")[0] == [1, 1]
    assert kept_of([[0, 1], [1, 3]], [1], "choice_major")[0] == [1, 0]
    gates = [[0.4, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0]]
    assert kept_of([[0], [1]], [1], "probability", gates=gates)[0] == [1]
    assert kept_of([[0], [0]], [1], "probability", gates=gates)[0] == [0]
