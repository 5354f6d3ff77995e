"""Steps as they are kept: only while somebody watches, in their order, with the times of one step after another."""

import pytest

from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.scheduler import SchedulerStats
from turnout.inference.core.step import Scheduled, StepPlan
from turnout.inference.timeline import STEPS, WATCHED, Timeline

STATS = SchedulerStats(2, 1, 0.5, 0.4, 0, 0, 0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timeline(clock: Clock) -> Timeline:
    return Timeline(clock)


REQUEST = Request("a", (1, 2, 3), SamplingParams())


def plan(start: int = 0, count: int = 3, samples: bool = True) -> StepPlan:
    return StepPlan((Scheduled(REQUEST, start, count, (0,) * count, (1,), samples),), count, (), ())


def run(timeline: Timeline, clock: Clock, seconds: float = 1.0, of: StepPlan | None = None) -> None:
    timeline.launched()
    clock.now += seconds
    timeline.committed(of or plan(), STATS, clock.now)


def test_nothing_is_kept_unless_somebody_watches(timeline, clock):
    run(timeline, clock)
    assert timeline.since(0) == []
    run(timeline, clock)
    (found,) = timeline.since(0)
    assert (found.number, found.start, found.seconds, found.num_tokens) == (2, 101.0, 1.0, 3)
    assert (found.running, found.waiting, found.usage) == (2, 1, 0.5)
    run(timeline, clock, WATCHED)
    run(timeline, clock, 0.5)
    assert timeline.since(0) == []
    assert timeline.last == 4


def test_only_what_is_new_comes_and_only_the_last_steps_are_kept(timeline, clock):
    timeline.since(0)
    for _ in range(STEPS + 5):
        run(timeline, clock, 0.001)
    assert [r.number for r in timeline.since(0)] == list(range(6, STEPS + 6))
    assert [r.number for r in timeline.since(STEPS + 3)] == [STEPS + 4, STEPS + 5]
    assert timeline.since(STEPS + 5) == []


def test_a_step_that_was_launched_ahead_starts_when_the_one_before_ends(timeline, clock):
    timeline.since(0)
    timeline.launched()
    timeline.launched()
    for _ in range(2):
        clock.now += 1
        timeline.committed(plan(), STATS, clock.now)
    assert [(r.start, r.seconds) for r in timeline.since(0)] == [(100.0, 1.0), (101.0, 1.0)]


def test_what_is_discarded_and_what_computes_nothing_is_no_step(timeline, clock):
    timeline.since(0)
    timeline.launched()
    timeline.discarded()
    clock.now += 5
    run(timeline, clock, 1.0, StepPlan((), 0, (), ()))
    assert timeline.since(0) == []
    run(timeline, clock)
    assert [(r.number, r.start) for r in timeline.since(0)] == [(1, 106.0)]


@pytest.mark.parametrize(
    ("start", "count", "samples", "decodes"),
    [(0, 3, True, False), (0, 2, False, False), (2, 1, True, False), (3, 1, True, True), (3, 2, True, False)],
)
def test_a_decode_is_one_token_behind_the_prompt(timeline, clock, start, count, samples, decodes):
    timeline.since(0)
    run(timeline, clock, of=plan(start, count, samples))
    ((share,),) = [record.each() for record in timeline.since(0)]
    assert share.request is REQUEST
    assert (share.start, share.count, share.samples, share.decodes) == (start, count, samples, decodes)
