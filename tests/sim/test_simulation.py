"""The scheduler keeps its invariants under every seed: arrivals, aborts, stops, preemption and a full queue."""

from collections import Counter

import pytest

from turnout.tests.sim.simulator import Simulation

QUICK, CHUNK, ALL = 150, 100, 3000


@pytest.mark.parametrize("seed", range(QUICK))
def test_every_invariant_holds_after_every_step(seed):
    Simulation(seed).run()


@pytest.mark.full
@pytest.mark.parametrize("first", range(QUICK, ALL, CHUNK))
def test_every_invariant_holds_for_thousands_of_seeds(first):
    for seed in range(first, min(first + CHUNK, ALL)):
        Simulation(seed).run()


def test_the_quick_seeds_meet_every_situation():
    seen: Counter[str] = Counter()
    for seed in range(QUICK):
        simulation = Simulation(seed)
        simulation.run()
        seen.update(simulation.seen)
    aborts = {
        f"abort {when}: {status}"
        for when in ("between steps", "during a step")
        for status in ("waiting", "running", "preempted")
    }
    others = {"preempted", "hit", "chunked", "expired", "stop string", "refused RequestError", "refused QueueFullError"}
    assert all(seen[situation] >= 5 for situation in aborts | others), seen


def test_a_seed_replays_exactly():
    first, again, other = Simulation(3), Simulation(3), Simulation(4)
    for simulation in (first, again, other):
        simulation.run()
    assert first.trace == again.trace != other.trace
