"""The collapse alarm: the measure by hand, once a collapse, never for a layer that can not collapse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnout.moe.train.alarm import CollapseAlarm, evenness

EVEN, ALL_TO_ONE, ALL_TO_TWO = [0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("load", "top_k", "expected"),
    [
        (EVEN, 1, 1.0),
        (EVEN, 2, 1.0),
        (ALL_TO_ONE, 1, 0.0),
        (ALL_TO_TWO, 1, 1 / 3),
        (ALL_TO_TWO, 2, 0.0),
        (ALL_TO_ONE, 2, 0.0),  # second choices that are not drawn
        (EVEN, 4, None),
        ([0.0] * 4, 1, None),
        ([1.0], 1, None),
    ],
)
def test_evenness_by_hand(load, top_k, expected):
    assert evenness(load, top_k) == (expected if expected is None else pytest.approx(expected, abs=1e-12))


@given(st.lists(st.integers(0, 100), min_size=3, max_size=9).filter(sum), st.integers(1, 2))
def test_evenness_lies_between_0_and_1_and_knows_no_order(counts, top_k):
    load = [count / sum(counts) for count in counts]
    even = evenness(load, top_k)
    assert 0 <= even <= 1 + 1e-9
    assert even == pytest.approx(evenness(load[::-1], top_k), abs=1e-9)
    assert even == pytest.approx(1) or max(counts) > min(counts)


def row(step, *loads):
    return {"step": step, "moe_layers": [2 * i + 1 for i in range(len(loads))], "expert_load": list(loads)}


def fired(alarm, *rows):
    return [[event.layer for event in alarm.check(row(step, *loads))] for step, loads in enumerate(rows)]


def test_it_fires_once_after_patience_rows_and_again_only_after_recovery():
    one, even = (ALL_TO_ONE,), (EVEN,)
    alarm = CollapseAlarm(0.1, 3, 1)
    assert fired(alarm, one, one, one, one, one) == [[], [], [1], [], []]
    assert fired(alarm, even, one, one, even, one, one, one, one) == [[]] * 6 + [[1], []]


def test_layers_are_watched_apart():
    alarm = CollapseAlarm(0.1, 2, 1)
    assert fired(alarm, (EVEN, ALL_TO_ONE), (ALL_TO_ONE, ALL_TO_ONE), (ALL_TO_ONE, EVEN)) == [[], [3], [1]]


@pytest.mark.parametrize(("threshold", "fires"), [(None, False), (0.05, False), (0.2, True)])
def test_the_threshold_decides(threshold, fires):
    nearly = [0.97, 0.01, 0.01, 0.01]
    assert 0.05 < evenness(nearly, 1) < 0.2
    assert bool(CollapseAlarm(threshold, 1, 1).check(row(7, nearly))) is fires


def test_a_dense_mixture_is_never_alarmed():
    assert fired(CollapseAlarm(0.99, 1, 4), (ALL_TO_ONE,), (ALL_TO_ONE,)) == [[], []]


def test_an_event_says_layer_expert_share_and_what_to_do():
    (event,) = CollapseAlarm(0.1, 1, 1).check(row(120, EVEN, [0.0, 0.02, 0.98, 0.0]))
    assert (event.step, event.layer, event.expert_load) == (120, 3, (0.0, 0.02, 0.98, 0.0))
    assert event.evenness == pytest.approx((math.exp(-0.02 * math.log(0.02) - 0.98 * math.log(0.98)) - 1) / 3)
    assert event.text.startswith("layer 3 has collapsed: expert 2 of 4 takes 98.0% of the assignments (evenness 0.03)")
    assert "moe.balance_loss" in event.text
