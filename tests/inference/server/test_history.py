"""A window of the routers' sums is what came in it, and reaches back a minute at most."""

import torch

from turnout.inference.server.history import LONGEST, RoutingHistory
from turnout.moe.routing.stats import REST, RoutingSnapshot


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def snapshot(count: int) -> RoutingSnapshot:
    return RoutingSnapshot((1,), torch.full((1, 2 + REST), float(count), dtype=torch.float64))


def test_a_window_has_what_came_in_it():
    clock = Clock()
    history = RoutingHistory(clock)
    assert history.window(snapshot(7), 5)[1].counts() == [[0, 0]], "before the first look"
    for second in range(2 * LONGEST):
        history.look(snapshot(second))
        clock.now += 0.5
        history.look(snapshot(1000))  # too soon: not kept
        clock.now += 0.5
    newest = snapshot(2 * LONGEST)
    for seconds in (1, 10, LONGEST):
        length, sums = history.window(newest, seconds)
        assert (length, sums.counts(), sums.dropped()) == (seconds, [[seconds, seconds]], [seconds])
    assert history.uptime == 2 * LONGEST
    assert history.window(newest, 10 * LONGEST)[0] <= LONGEST + 1


def test_a_young_history_gives_what_it_has():
    clock = Clock()
    history = RoutingHistory(clock)
    history.look(snapshot(3))
    clock.now += 2
    length, sums = history.window(snapshot(8), 30)
    assert (length, sums.counts()) == (2, [[5, 5]])
