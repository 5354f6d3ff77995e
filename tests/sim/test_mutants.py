"""The simulator finds every mistake that it is there to find, and names the rule that is broken."""

import pytest

from turnout.inference.core.scheduler import Scheduler
from turnout.tests.sim import mutants
from turnout.tests.sim.simulator import Simulation

SEEDS = 150
BROKEN_RULE = {
    mutants.StaleHash: "I4",
    mutants.MissingReference: "I1",
    mutants.EvictReferenced: "I1",
    mutants.DoubleFree: "I1",
    mutants.OffByOneSlot: "every token has a slot",
    mutants.PublishAtAllocation: "I3",
    mutants.FullHit: "P1",
    mutants.HeadsFirst: "I6",
    mutants.KeepDuplicates: "I4",
    mutants.NoParent: "canary",
    mutants.NoSalt: "canary",
    mutants.ZeroTokenStep: "P1",
    mutants.LateOutput: "P5",
    mutants.FreedInFlight: "I7",
    mutants.HeldForEver: "I1",
    mutants.ChunkSamples: "P6",
    mutants.OldestVictim: "P4",
    mutants.BackOfTheQueue: "P10",
    mutants.LostToken: "P3",
    mutants.PriorityIgnored: "P4",
    mutants.NoCopy: "canary",
    mutants.SharedTail: "I8",
    mutants.ForkTooEarly: "I5",
    mutants.TableOfBefore: "I7",
    mutants.PreemptsAhead: "a share",
    mutants.TrustsTheFailed: "I4",
    mutants.SuspectsTogether: "a suspect",
    mutants.OpenBatch: "a batch",
    mutants.NoDeadline: "P10",
    mutants.NoEncoderInput: "O12",
    mutants.MemoryWithoutReference: "I1",
    mutants.MemoryForEver: "I1",
    mutants.MemoryNameKept: "O12",
    mutants.MemoryOfBefore: "O12",
    mutants.EncoderIsFree: "the budget holds",
}


@pytest.mark.parametrize(("mutant", "rule"), BROKEN_RULE.items(), ids=lambda value: getattr(value, "__name__", value))
def test_the_simulator_kills(mutant, rule):
    changed = "scheduler" if issubclass(mutant, Scheduler) else "blocks"
    complaints = set()
    for seed in range(SEEDS):
        try:
            Simulation(seed, **{changed: mutant}, encoder=mutant in mutants.WITH_ENCODER).run()
        except (AssertionError, LookupError) as error:
            complaints.add(str(error))
            if str(error).startswith(rule):
                return
    pytest.fail(f"{mutant.__name__} lives: {mutant.__doc__} Complaints: {complaints}")


def test_every_mutant_is_hunted():
    written = {
        value
        for value in vars(mutants).values()
        if isinstance(value, type) and value.__module__ == mutants.__name__ and not value.__name__.startswith("_")
    }
    assert written == BROKEN_RULE.keys()
