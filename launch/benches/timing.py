"""Times that can be compared: forms take turns, so that what slows the machine slows them all; medians count."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

SLOW = 1.0  # seconds of one call, from which on a form is measured once
TURN = 0.004  # seconds that a turn takes at least
MOST = 64  # calls in a turn

Run = Callable[[int], object]
"""One call; the integer counts them, so that a form can take the next of several inputs and never finds them cached."""


def alternate(forms: Mapping[str, Run], rounds: int, cuda: bool = False) -> dict[str, float]:
    """Form → seconds of a call: median of `rounds` turns, taken one after another.

    Args:
        forms: what is compared; each is called twice before anything counts.
        rounds: turns of each.
        cuda: time by events on the current stream.
    """
    clock = _events if cuda else _clock
    done = dict.fromkeys(forms, 0)
    found: dict[str, list[float]] = {name: [] for name in forms}

    def turn(name: str, calls: int) -> float:
        start = done[name]
        done[name] += calls
        return clock(forms[name], start, calls) / calls

    alone = {}
    for name in forms:
        alone[name] = turn(name, 1)
        if alone[name] < SLOW:
            alone[name] = turn(name, 1)
    for number in range(rounds):
        for name, once in alone.items():
            if once < SLOW or number == 0:
                found[name].append(turn(name, min(max(int(TURN / once), 1), MOST)))
    return {name: statistics.median(times) for name, times in found.items()}


def _clock(run: Run, start: int, calls: int) -> float:
    began = time.perf_counter()
    for i in range(start, start + calls):
        run(i)
    return time.perf_counter() - began


def _events(run: Run, start: int, calls: int) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for i in range(start, start + calls):
        run(i)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
