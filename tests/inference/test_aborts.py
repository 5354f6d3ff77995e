"""The abort matrix on the engine: from wherever a request goes, nothing is left of it and nobody else notices.

`make_engine` holds the other half of each test: after it no engine has a request, a choice or a block in use.
"""
# ruff: noqa: N802 (A1 is the name of a rule)

from collections.abc import Callable

import pytest

from turnout.inference.core.request import Request, Status
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.outputs import RequestOutput

Work = dict[str, tuple[list[int], SamplingParams]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.2, max_tokens=14, seed=7, n=2)
OTHERS: Work = {"greedy": (list(range(1, 20)), GREEDY), "drawn": (list(range(40, 75)), DRAWN)}
VICTIM = list(range(100, 130))


def finish(engine: Engine, seen: dict[str, RequestOutput]) -> dict[str, RequestOutput]:
    """Run to the end; the last output of every request."""
    while engine.has_unfinished:
        seen |= {output.request_id: output for output in engine.step()}
    return seen


def tokens(output: RequestOutput) -> list[list[int]]:
    return [choice.token_ids for choice in output.outputs]


def started(engine: Engine, work: Work = OTHERS) -> dict[str, RequestOutput]:
    for name, (prompt, params) in work.items():
        engine.add_request(name, prompt, params)
    return {}


def parts(engine: Engine, name: str) -> list[Request]:
    """What the scheduler knows of a request: one a choice."""
    return [part for part in engine.scheduler.requests.values() if part.id.startswith(name)]


@pytest.fixture
def unchanged(make_engine) -> Callable[[Engine, dict[str, RequestOutput]], None]:
    """Finish what runs: the others must say what they say when nobody is aborted beside them."""

    def check(engine: Engine, seen: dict[str, RequestOutput]) -> None:
        stats = engine.stats()
        assert not parts(engine, "victim")
        assert stats.running + stats.waiting <= len(engine.scheduler.requests)
        found = finish(engine, seen)
        expected = finish(alone := make_engine(), started(alone))
        for name in OTHERS:
            assert tokens(found[name]) == tokens(expected[name])
            assert [c.finish_reason for c in found[name].outputs] == [c.finish_reason for c in expected[name].outputs]
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.usage) == (0, 0, 0)

    return check


def step_until(engine: Engine, seen: dict[str, RequestOutput], condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        seen |= {output.request_id: output for output in engine.step()}
    pytest.fail("it never came to that")


def aborted(output: RequestOutput | None, counts: list[int]) -> None:
    assert output is not None
    assert output.finished
    assert [choice.finish_reason for choice in output.outputs] == ["abort"] * len(counts)
    assert [len(choice.token_ids) for choice in output.outputs] == counts


def test_A1_waiting(make_engine, unchanged):
    engine = make_engine(max_num_seqs=3)
    seen = started(engine)
    engine.step()
    engine.add_request("victim", VICTIM, GREEDY)
    engine.step()
    assert [part.status for part in parts(engine, "victim")] == [Status.WAITING]
    aborted(engine.abort("victim"), [0])
    unchanged(engine, seen)


def test_A2_mid_chunk(make_engine, unchanged):
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=4)
    seen = started(engine, {"victim": (VICTIM, GREEDY)} | OTHERS)
    step_until(engine, seen, lambda: 8 <= parts(engine, "victim")[0].num_computed_tokens < len(VICTIM))
    aborted(engine.abort("victim"), [0])
    unchanged(engine, seen)


@pytest.mark.parametrize("at", [0, 3], ids=["prefill", "decode"])
def test_A3_in_the_launched_step(make_engine, unchanged, at):
    """Its blocks stay its own until the step is over, and the step's token reaches nobody."""
    engine = make_engine(overlap=True, max_num_batched_tokens=16, max_num_seqs=4)
    seen = started(engine, {"victim": (VICTIM, GREEDY)} | OTHERS)
    (victim,) = parts(engine, "victim")
    step_until(engine, seen, lambda: victim.in_flight > 0 and victim.num_output_tokens == at)
    table = list(victim.block_table)
    aborted(engine.abort("victim"), [at])
    assert all(engine.blocks.counts[block] for block in table)
    step_until(engine, seen, lambda: not victim.in_flight)
    assert not victim.block_table
    assert victim.num_output_tokens == at
    unchanged(engine, seen)


def test_A4_in_decode(make_engine, unchanged):
    engine = make_engine()
    seen = started(engine, OTHERS | {"victim": (VICTIM, GREEDY)})
    step_until(engine, seen, lambda: "victim" in seen and len(tokens(seen["victim"])[0]) == 5)
    aborted(engine.abort("victim"), [5])
    unchanged(engine, seen)


def test_A5_preempted(make_engine, unchanged):
    engine = make_engine(num_blocks=9, max_num_seqs=4)
    seen = started(engine, OTHERS | {"victim": (VICTIM, GREEDY)})
    step_until(engine, seen, lambda: parts(engine, "victim")[0].status is Status.PREEMPTED)
    count = len(tokens(seen["victim"])[0]) if "victim" in seen else 0
    aborted(engine.abort("victim"), [count])
    unchanged(engine, seen)


def test_A7_last_token_already_sampled(make_engine, unchanged):
    engine = make_engine()
    once = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    seen = started(engine, OTHERS | {"victim": (VICTIM, once)})
    step_until(engine, seen, lambda: "victim" in seen and seen["victim"].finished)
    assert engine.abort("victim") is None
    assert [(choice.finish_reason, len(choice.token_ids)) for choice in seen["victim"].outputs] == [("length", 3)]
    unchanged(engine, seen)


def test_A8_one_choice_of_several_finished(make_engine, unchanged):
    probe = make_engine()
    free = finish(probe, started(probe, {"victim": (VICTIM, DRAWN)}))["victim"]
    first, second = tokens(free)
    at = next(i for i in range(3, 12) if first[i] not in first[:i] + second)
    stopping = SamplingParams(temperature=1.2, max_tokens=14, seed=7, n=2, stop_token_ids=[first[at]])
    engine = make_engine()
    seen = started(engine, OTHERS | {"victim": (VICTIM, stopping)})
    step_until(engine, seen, lambda: "victim" in seen and seen["victim"].outputs[0].finish_reason == "stop")
    output = engine.abort("victim")
    assert [choice.finish_reason for choice in output.outputs] == ["stop", "abort"]
    assert 0 < len(tokens(output)[1]) < 14
    unchanged(engine, seen)


def test_A9_unknown_id(make_engine, unchanged):
    engine = make_engine()
    seen = started(engine)
    assert engine.abort("nobody") is None
    engine.step()
    assert engine.abort("greedy#0") is None, "a choice is no request"
    unchanged(engine, seen)


def test_A10_id_twice(make_engine, unchanged):
    engine = make_engine()
    seen = started(engine, OTHERS | {"victim": (VICTIM, GREEDY)})
    engine.step()
    assert engine.abort("victim") is not None
    assert engine.abort("victim") is None
    engine.add_request("victim", VICTIM, GREEDY)
    step_until(engine, seen, lambda: parts(engine, "victim") and parts(engine, "victim")[0].num_output_tokens > 0)
    assert len(tokens(engine.abort("victim"))[0]) > 0, "the id was free again at once"
    assert engine.abort("victim") is None
    unchanged(engine, seen)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_A11_all(make_engine, steps):
    engine = make_engine(num_blocks=10, max_num_seqs=3)
    work = OTHERS | {"late": (VICTIM, GREEDY)}
    started(engine, work)
    for _ in range(steps):
        engine.step()
    outputs = engine.abort_all()
    assert [output.request_id for output in outputs] == list(work)
    assert all(choice.finish_reason == "abort" for output in outputs for choice in output.outputs)
    assert engine.abort_all() == []
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.usage) == (0, 0, 0)
