"""Loads have the shape they are asked for, the same one at every rate."""

import numpy as np
import pytest

from turnout import ConfigError
from turnout.launch.benches.arrivals import Arrivals, Burst, Ramp, loads
from turnout.launch.benches.online import Ask

UNIT = tuple(float(at) for at in np.cumsum(np.random.default_rng(0).exponential(1.0, 4000)))
ASKS = [Ask(prompt="x", tokens=1, due=at) for at in UNIT]


def due(asks=ASKS, **arrivals):
    (load,) = loads(Arrivals(**arrivals), asks)
    return [ask.due for ask in load.asks]


def test_all_are_there_at_once_unless_a_rate_is_given():
    assert set(due()) == {0.0}
    assert due(rate=(4.0,)) == due(rate=(4.0,), load="poisson") == [at / 4 for at in UNIT]


def test_a_load_for_every_rate_with_the_same_pattern():
    slow, fast = loads(Arrivals(rate=(1.0, 2.0)), ASKS)
    assert (slow.label, fast.label) == ({"rate": 1.0}, {"rate": 2.0})
    assert [ask.due for ask in slow.asks] == [2 * ask.due for ask in fast.asks]


def test_bursts_come_at_once_and_leave_gaps():
    assert due(ASKS[:7], load="burst", burst=Burst(size=3, gap=0.5)) == [0, 0, 0, 0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(("start", "end"), [(2.0, 10.0), (10.0, 2.0), (5.0, 5.0), (0.0, 8.0)])
def test_a_ramp_reaches_its_rates(start, end):
    ramp = Ramp(start=start, end=end, seconds=100.0)
    found = np.array(due(load="ramp", ramp=ramp))
    assert (np.diff(found) >= 0).all()

    def expected(at):
        held = np.minimum(at, 100.0)
        return start * held + (end - start) * held**2 / 200 + np.maximum(at - 100.0, 0) * end

    np.testing.assert_allclose(expected(found), UNIT, rtol=1e-9)
    counts = [((found >= at) & (found < at + 10)).sum() for at in (0, 45, 90)]
    rates = [start + (end - start) * at / 100 for at in (5, 50, 95)]
    np.testing.assert_allclose(counts, [10 * rate for rate in rates], atol=4 * (10 * max(rates)) ** 0.5)


def test_a_closed_loop_has_seats_and_no_times():
    one, eight = loads(Arrivals(load="closed", concurrency=(1, 8)), ASKS[:5])
    assert (one.seats, eight.seats, one.label) == (1, 8, {"concurrency": 1})
    assert {ask.due for ask in one.asks} == {0.0}


def test_a_trace_keeps_its_times_or_their_shape_at_another_rate():
    asks = [Ask(prompt="x", tokens=1, due=at) for at in (0.0, 1.0, 5.0, 6.0)]
    assert due(asks, load="trace") == [0.0, 1.0, 5.0, 6.0]
    assert due(asks, load="trace", rate=(1.0,)) == [0.0, 0.5, 2.5, 3.0]
    assert due(asks[:1], load="trace", rate=(1.0,)) == [0.0]


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("rate", {"rate": (0.0,)}), ("rate", {"rate": (float("inf"),)}), ("rate", {"load": "poisson"}),
        ("rate", {"load": "burst", "rate": (1.0,)}), ("rate", {"load": "ramp", "rate": (1.0,)}),
        ("concurrency", {"load": "closed"}), ("concurrency", {"concurrency": (4,)}),
        ("concurrency", {"load": "closed", "concurrency": (0,)}),
    ],
)  # fmt: skip
def test_a_shape_with_another_shapes_numbers_is_refused(field, settings):
    with pytest.raises(ConfigError, match=rf"^{field} \("):
        Arrivals(**settings)


@pytest.mark.parametrize("make", [lambda: Burst(size=0), lambda: Burst(gap=0.0), lambda: Ramp(end=0.0)])
def test_numbers_of_a_shape_are_bounded(make):
    with pytest.raises(ConfigError, match="must be"):
        make()
