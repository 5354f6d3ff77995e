"""A step that raises: whose fault it is fails, the others say what they would have said, and the engine goes on."""

from collections.abc import Callable

import pytest

from turnout.inference.choice import Choice
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.step import Scheduled, StepPlan
from turnout.inference.engine import Engine
from turnout.inference.errors import QueueTimeoutError, StepError
from turnout.inference.outputs import FailedOutput, RequestOutput
from turnout.inference.run import runner

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.1, max_tokens=9, seed=3, n=2, logprobs=1)
OTHERS = {"greedy": (list(range(1, 40)), GREEDY), "drawn": (list(range(50, 71)), DRAWN), "short": ([7], GREEDY)}
BAD = list(range(200, 240))
WAYS = [{"overlap": False}, {"overlap": True}, {"enable_prefix_caching": False, "max_num_batched_tokens": 16}]
FAULT = "no such kernel"


class BrokenForward:
    """The runner's forward pass, but it raises for a step that holds a bad item."""

    def __init__(self, engine: Engine, bad: Callable[[Scheduled], bool]) -> None:
        self.calls = 0
        self._forward, self._bad = engine.runner.forward, bad
        engine.runner.forward = self

    def __call__(self, plan: StepPlan):
        if any(self._bad(item) for item in plan.scheduled):
            self.calls += 1
            raise RuntimeError(FAULT)
        return self._forward(plan)


def add(engine: Engine, bad: SamplingParams | None = GREEDY) -> None:
    for name, (prompt, params) in OTHERS.items():
        engine.add_request(name, prompt, params)
        if bad is not None and name == "greedy":
            engine.add_request("bad", BAD, bad)


def finish(engine: Engine) -> dict[str, RequestOutput]:
    seen, steps = {}, 0
    while engine.has_unfinished:
        seen |= {output.request_id: output for output in engine.step()}
        steps += 1
        assert steps < 500, "no end in sight"
    return seen


def failed(output: RequestOutput, cause: str = FAULT) -> None:
    assert isinstance(output, FailedOutput)
    assert isinstance(output.error, StepError)
    assert cause in str(output.error)
    assert "abort" in [choice.finish_reason for choice in output.outputs]


@pytest.fixture
def unharmed(make_engine) -> Callable[[Engine, dict[str, RequestOutput]], None]:
    """The others' tokens are those of an engine in which nothing happens, and this engine still works."""

    def check(engine: Engine, found: dict[str, RequestOutput]) -> None:
        add(alone := make_engine(), bad=None)
        expected = finish(alone)
        for name in OTHERS:
            assert [c.token_ids for c in found[name].outputs] == [c.token_ids for c in expected[name].outputs]
            assert [c.finish_reason for c in found[name].outputs] == [c.finish_reason for c in expected[name].outputs]
        engine.add_request("after", *OTHERS["greedy"])
        (after,) = finish(engine).values()
        assert after.outputs == expected["greedy"].outputs

    return check


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("at", [1, len(BAD), len(BAD) + 4], ids=["first chunk", "prompt", "decode"])
def test_a_forward_that_raises_fails_the_request_whose_fault_it_is(make_engine, unharmed, way, at):
    engine = make_engine(**way)
    broken = BrokenForward(engine, lambda item: item.request.id == "bad#0" and item.end >= at)
    add(engine)
    found = finish(engine)
    assert broken.calls >= 2, "together, then alone"
    failed(found["bad"])
    assert len(found["bad"].outputs[0].token_ids) == max(0, at - len(BAD))
    unharmed(engine, found)


def test_a_fault_that_passes_does_not_fail_who_is_alone(make_engine):
    engine = make_engine()
    broken = BrokenForward(engine, lambda item: broken.calls == 0)
    engine.add_request("x", *OTHERS["greedy"])
    (output,) = finish(engine).values()
    assert (broken.calls, output.outputs[0].finish_reason) == (1, "length")


def test_a_fault_that_passes_fails_nobody(make_engine, unharmed):
    engine = make_engine()
    engine.add_request("bad", BAD, GREEDY)
    (expected,) = finish(engine).values()
    again = make_engine()
    broken = BrokenForward(again, lambda item: broken.calls == 0 and item.request.num_output_tokens == 3)
    add(again)
    found = finish(again)
    assert broken.calls == 1
    assert found["bad"].outputs == expected.outputs
    unharmed(again, found)


def test_one_choice_at_fault_fails_its_request(make_engine, unharmed):
    engine = make_engine()
    BrokenForward(engine, lambda item: item.request.id == "bad#1" and item.request.num_output_tokens == 2)
    add(engine, bad=DRAWN)
    found = finish(engine)
    failed(found["bad"])
    assert len(found["bad"].outputs) == 2
    unharmed(engine, found)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_row_that_breaks_the_sampler_fails_alone(make_engine, unharmed, monkeypatch, overlap):
    real = runner.sample

    def sample(logits_RV, items):
        if any(item.request.params.seed == 666 for item in items):
            raise ValueError("no such row")
        return real(logits_RV, items)

    monkeypatch.setattr(runner, "sample", sample)
    engine = make_engine(overlap=overlap)
    add(engine, bad=SamplingParams(seed=666))
    found = finish(engine)
    failed(found["bad"], "ValueError: no such row")
    unharmed(engine, found)


@pytest.mark.parametrize("part", ["_detokenizer", "_text"])
def test_a_text_that_breaks_fails_alone(make_engine, unharmed, part):
    def push(*_):
        raise UnicodeError("no such character")

    engine = make_engine()
    add(engine, bad=DRAWN)
    getattr(engine._ledger.choices["bad#1"], part).push = push
    found = finish(engine)
    failed(found["bad"], "UnicodeError: no such character")
    unharmed(engine, found)


def test_a_report_that_breaks_fails_alone(make_engine, unharmed):
    def broken(*_):
        raise ValueError("no such row")

    for asked, part in (({"prompt_logprobs": 1}, "score"), ({"routed_experts": True}, "report")):
        engine = make_engine()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Choice, part, broken)
            add(engine, bad=SamplingParams(max_tokens=5, **asked))
            found = finish(engine)
        failed(found["bad"], "ValueError: no such row")
        unharmed(engine, found)


def test_when_nothing_can_be_computed_the_engine_says_so(make_engine):
    engine = make_engine()
    BrokenForward(engine, lambda item: True)
    add(engine)
    with pytest.raises(RuntimeError, match=FAULT):
        finish(engine)
    engine.abort_all()


def test_who_is_aborted_in_the_failing_step_is_not_blamed(make_engine, unharmed):
    engine = make_engine(overlap=True)
    add(engine)
    BrokenForward(engine, lambda item: item.request.id == "bad#0" and item.end > len(BAD) + 1)
    seen = {}
    while not (engine._plans and "bad" in seen and len(seen["bad"].outputs[0].token_ids) == 1):
        seen |= {output.request_id: output for output in engine.step()}
    gone = engine.abort("bad")
    assert not isinstance(gone, FailedOutput)
    seen |= finish(engine)
    unharmed(engine, seen)


def test_who_expires_as_a_step_fails_is_told_so(model, byte_level, make_engine):
    now = [0.0]
    engine = make_engine(max_num_seqs=1, queue_timeout=5)
    engine.scheduler._deadlines._clock = lambda: now[0]
    engine._clock = lambda: now[0]
    broken = BrokenForward(engine, lambda item: broken.calls == 0 and now[0] > 5)
    engine.add_request("runs", [1, 2], GREEDY)
    engine.step()
    engine.add_request("late", [1, 2], GREEDY)
    now[0] = 6.0
    found = finish(engine)
    assert broken.calls == 1
    assert isinstance(found["late"].error, QueueTimeoutError)
    assert len(found["runs"].outputs[0].token_ids) == 12
