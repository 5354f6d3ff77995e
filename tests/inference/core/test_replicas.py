"""Several schedulers seen as one: where a request goes, what a step is, and that nothing is left behind."""
# ruff: noqa: N802 (M4 is the name of a rule)

import pytest

from turnout import RequestError
from turnout.inference.config import EngineConfig
from turnout.inference.core.blocks import BlockManager
from turnout.inference.core.replicas import NOTHING, JointPlan, Replicas
from turnout.inference.core.request import QueueFullError, Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.scheduler import Scheduler

CONFIG = EngineConfig(num_blocks=16, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, max_waiting=6)


@pytest.fixture
def replicas():
    def scheduler() -> Scheduler:
        return Scheduler(CONFIG, BlockManager(CONFIG.num_blocks, CONFIG.block_size), lambda: 0.0)

    made = Replicas([scheduler(), scheduler()])
    yield made
    stats = made.stats()
    assert (stats.running, stats.waiting, stats.usage) == (0, 0, 0)
    assert not any(scheduler.requests for scheduler in made.schedulers)


def request(name: str, prompt: range = range(5), **params) -> Request:
    options = {"max_tokens": 3, "ignore_eos": True} | params
    return Request(id=name, prompt_token_ids=tuple(prompt), params=SamplingParams(**options))


def home(replicas: Replicas, name: str) -> int:
    return next(i for i, scheduler in enumerate(replicas.schedulers) if name in scheduler.requests)


def run(replicas: Replicas) -> list[JointPlan]:
    """Steps until nothing is left; every sampled token is 7."""
    plans = []
    while any(scheduler.requests for scheduler in replicas.schedulers):
        plans.append(replicas.schedule())
        replicas.commit(plans[-1], {item.request.id: 7 for item in plans[-1].scheduled if item.samples})
    return plans


def test_requests_go_where_the_least_work_is_left_with_all_their_choices(replicas):
    replicas.add(request("long", range(12), max_tokens=9))
    replicas.add(request("a#0"), request("a#1"))
    replicas.add(request("b"))
    assert [home(replicas, name) for name in ("long", "a#0", "a#1", "b")] == [0, 1, 1, 1]
    replicas.add(request("c", max_tokens=1))
    assert home(replicas, "c") == 0
    run(replicas)


def test_a_cached_prefix_is_work_that_is_not_left(replicas):
    replicas.add(request("first", range(9), max_tokens=1))
    replicas.add(request("other", range(50, 59), max_tokens=1))
    assert (home(replicas, "first"), home(replicas, "other")) == (0, 1)
    run(replicas)
    replicas.add(request("other again", range(50, 59), max_tokens=1))
    assert home(replicas, "other again") == 1
    assert replicas.schedule().parts[1].scheduled[0].start == 8
    replicas.abort("other again")
    run_out(replicas)


def run_out(replicas: Replicas) -> None:
    """Commit the launched step, all of whose requests have ended."""
    for scheduler in replicas.schedulers:
        scheduler.commit(scheduler._launched[0], {})


def test_M4_every_step_has_a_part_for_every_replica(replicas):
    replicas.add(request("alone", range(12)))
    plans = run(replicas)
    assert [[part.num_tokens for part in plan.parts] for plan in plans] == [[8, 0], [4, 0], [1, 0], [1, 0]]
    assert [plan.num_tokens for plan in plans] == [8, 4, 1, 1]


def test_a_step_ahead_leaves_out_the_replicas_that_can_not_look(replicas):
    replicas.add(request("plain", range(6)))
    replicas.add(request("later"), held=True)
    first = replicas.schedule()
    ahead = replicas.schedule_ahead()
    assert [part is NOTHING for part in ahead.parts] == [False, True]
    assert ahead.scheduled[0].token_ids == []
    replicas.release("later")
    replicas.commit(first, {"plain": 7})
    third = replicas.schedule_ahead()
    assert [item.request.id for item in third.parts[1].scheduled] == ["later"]
    replicas.commit(ahead, {"plain": 7})
    assert "later" in {request.id for request in replicas.discard()}
    run(replicas)


def test_nothing_ahead_is_no_step(replicas):
    replicas.add(request("last", range(3), max_tokens=1))
    first = replicas.schedule()
    assert replicas.schedule_ahead() is None
    replicas.commit(first, {"last": 7})
    assert replicas.schedule_ahead() is None


def test_the_queue_is_one(replicas):
    for i in range(6):
        replicas.add(request(str(i)))
    with pytest.raises(QueueFullError, match=r"6 requests wait and 1 more would exceed max_waiting \(6\)"):
        replicas.add(request("7"))
    assert replicas.stats().waiting == 6
    run(replicas)


def test_an_id_is_one_of_all_replicas(replicas):
    replicas.add(request("same"))
    with pytest.raises(RequestError, match="must be new among live requests"):
        replicas.add(request("same"))
    run(replicas)


def test_requests_end_wherever_they_are(replicas):
    for name in ("a", "b", "c"):
        replicas.add(request(name))
    plan = replicas.schedule()
    assert replicas.abort("b").finish_reason == "abort"
    assert replicas.finish("c", "stop").finish_reason == "stop"
    assert replicas.abort("unknown") is None
    replicas.commit(plan, {"a": 7, "b": 7, "c": 7})
    run(replicas)
