"""The scheduler keeps its invariants under every seed: arrivals, aborts, stops, preemption and a full queue."""

from collections import Counter

import pytest

from turnout.tests.sim.simulator import Simulation

QUICK, CHUNK, ALL = 150, 100, 3000
QUICK_ENCODER = 100


@pytest.mark.parametrize("seed", range(QUICK))
def test_every_invariant_holds_after_every_step(seed):
    Simulation(seed).run()


@pytest.mark.parametrize("seed", range(QUICK_ENCODER))
def test_every_invariant_holds_with_an_encoder(seed):
    Simulation(seed, encoder=True).run()


@pytest.mark.full
@pytest.mark.parametrize("encoder", [False, True], ids=["decoder", "encoder"])
@pytest.mark.parametrize("first", range(QUICK_ENCODER, ALL, CHUNK))
def test_every_invariant_holds_for_thousands_of_seeds(first, encoder):
    for seed in range(first, min(first + CHUNK, ALL)):
        Simulation(seed, encoder=encoder).run()


@pytest.mark.parametrize(("encoder", "seeds"), [(False, QUICK), (True, QUICK_ENCODER)], ids=["decoder", "encoder"])
def test_the_quick_seeds_meet_every_situation(encoder, seeds):
    seen: Counter[str] = Counter()
    for seed in range(seeds):
        simulation = Simulation(seed, encoder=encoder)
        simulation.run()
        seen.update(simulation.seen)
    aborts = {
        f"abort {when}: {status}"
        for when in ("between steps", "during a step")
        for status in ("held", "waiting", "running", "preempted")
    }
    others = {
        "ahead",
        "scored",
        "released",
        "failed",
        "shrunk",
        "preempted",
        "chunked",
        "expired",
        "stop string",
        "refused RequestError",
        "refused QueueFullError",
    }
    others |= {"memory shared", "encoded again"} if encoder else {"hit", "forked", "copied"}
    assert all(seen[situation] >= 5 for situation in aborts | others), seen


def test_a_seed_replays_exactly():
    first, again, other = Simulation(3), Simulation(3), Simulation(4)
    for simulation in (first, again, other):
        simulation.run()
    assert first.trace == again.trace != other.trace
