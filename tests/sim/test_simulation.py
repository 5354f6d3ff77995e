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
    seen = Counter()
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
    def plans(seed: int) -> list[tuple]:
        simulation, found = Simulation(seed), []
        schedule = simulation.scheduler.schedule
        simulation.scheduler.schedule = lambda: found.append(schedule()) or found[-1]
        simulation.run()
        return [[(i.request.id, i.start, i.count) for i in plan.scheduled] for plan in found]

    assert plans(3) == plans(3)
    assert plans(3) != plans(4)
