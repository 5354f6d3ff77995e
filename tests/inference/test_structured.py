"""Structured output end to end: what a random model writes parses, whatever else happens to the request."""
# ruff: noqa: N802 (O10 is the name of a rule)

import gc
import json
import random
import re
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from turnout import RequestError
from turnout.inference.core.request import QueueFullError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.structured import StructuredOutputs
from turnout.inference.engine import Engine
from turnout.inference.errors import QueueTimeoutError
from turnout.inference.outputs import FailedOutput, RequestOutput
from turnout.inference.text.grammar import GrammarMatcher

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
ENDLESS = {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]}


def is_person(value: Any) -> bool:
    named = isinstance(value, dict) and set(value) == {"name", "age"}
    return named and len(value["name"]) <= 4 and 0 <= value["age"] <= 150


def parses(check: Callable[[Any], bool]) -> Callable[[str], bool]:
    return lambda text: check(json.loads(text))


SHAPES: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"json": PERSON}, parses(is_person)),
    (
        {"json": {"type": "array", "items": {"enum": ["é", 1, None]}, "minItems": 1, "maxItems": 4}},
        parses(lambda v: 1 <= len(v) <= 4 and all(item in ("é", 1, None) for item in v)),
    ),
    ({"json": {"type": "boolean"}}, parses(lambda v: v in (True, False))),
    ({"json": {"const": {"a": [1, "b"]}}}, parses(lambda v: v == {"a": [1, "b"]})),
    ({"json": {"type": "string", "pattern": "^[a-f]{1,3}$"}}, parses(lambda v: bool(re.fullmatch("[a-f]{1,3}", v)))),
    ({"regex": r"\(\d{3}\) \d{2}-[x-z]+!"}, lambda text: bool(re.fullmatch(r"\(\d{3}\) \d{2}-[x-z]+!", text))),
    ({"regex": "[日本語👍]{2,5}"}, lambda text: bool(re.fullmatch("[日本語👍]{2,5}", text))),
    ({"choice": ["yes", "no", "naïve", "the end"]}, lambda text: text in ("yes", "no", "naïve", "the end")),
    (
        {"grammar": 'start: sum\nsum: N | sum "+" N\nN: /[0-9]{1,2}/'},
        lambda t: bool(re.fullmatch(r"\d+(\+\d+)*", t)),
    ),
    ({"grammar": 'root ::= "<" [a-c]* ">"'}, lambda text: bool(re.fullmatch("<[a-c]*>", text))),
]


def params(seed: int = 0, wanted: dict[str, Any] | None = None, **changes: Any) -> SamplingParams:
    shape = None if wanted is None else StructuredOutputs(**wanted)
    return SamplingParams(**({"max_tokens": 200, "seed": seed, "structured_outputs": shape} | changes))


def run(engine: Engine) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        last |= {output.request_id: output for output in engine.step()}
    return last


def complete(engine: Engine, prompt: list[int], wanted: SamplingParams) -> RequestOutput:
    engine.add_request("x", prompt, wanted)
    return run(engine)["x"]


def step_until_compiled(engine: Engine) -> GrammarMatcher:
    """The first choice's matcher, as soon as it has one."""
    while not (request := next(iter(engine._ledger.choices.values())).request).grammar:
        engine.step()
    return request.grammar


def ending(model_of: Callable[..., Any], **changes: Any) -> Any:
    """A model with an end-of-sequence token: the tokenizer's control token."""
    return model_of(eos_token_id=0, **changes)


@pytest.mark.parametrize("overlap", [False, True])
def test_O10_everything_a_random_model_writes_has_the_wanted_shape(make_model, make_engine, overlap):
    engine = make_engine(ending(make_model), overlap=overlap, num_blocks=256)
    rng, checks = random.Random(0), {}
    for seed in range(3):
        for i, (wanted, check) in enumerate(SHAPES):
            name = f"{i}/{seed}"
            engine.add_request(name, [rng.randrange(1, 321) for _ in range(rng.randrange(1, 30))], params(seed, wanted))
            checks[name] = check
    engine.add_request("free", [1, 2, 3], params(max_tokens=30, ignore_eos=True))
    last = run(engine)
    assert len(last["free"].outputs[0].token_ids) == 30
    whole = 0
    for name, check in checks.items():
        (choice,) = last[name].outputs
        if choice.finish_reason == "stop":
            assert check(choice.text), (name, choice.text)
            whole += 1
        else:
            assert (choice.finish_reason, len(choice.token_ids)) == ("length", 200)
    assert whole >= 0.8 * len(checks), "some may add numbers or letters without end"


def test_O10_the_end_comes_only_where_the_text_is_whole(make_model, make_engine):
    """The model's favourite first token is its end of sequence."""
    greedy = params(temperature=0, max_tokens=30)
    favourite = complete(make_engine(make_model()), [7, 8, 9], greedy).outputs[0].token_ids[0]
    engine = make_engine(make_model(eos_token_id=favourite))
    (free,) = complete(engine, [7, 8, 9], greedy).outputs
    assert (free.text, free.token_ids) == ("", [favourite])
    for wanted, check in SHAPES:
        (choice,) = complete(engine, [7, 8, 9], params(wanted=wanted, temperature=0, max_tokens=30)).outputs
        assert choice.finish_reason == "length" or check(choice.text)
        assert favourite not in choice.token_ids[:-1]


def test_O10_a_text_that_nothing_can_follow_ends_the_request_with_its_last_token(make_model, make_engine):
    """With an end-of-sequence token, without one, and below `min_tokens`."""
    for model in (make_model(), ending(make_model)):
        engine = make_engine(model)
        for changes in ({}, {"ignore_eos": True}, {"min_tokens": 50}):
            (choice,) = complete(engine, [5, 6], params(wanted={"choice": ["yes", "no"]}, **changes)).outputs
            assert (choice.text in ("yes", "no"), choice.finish_reason) == (True, "stop")
            assert engine.tokenizer.decode(choice.token_ids) == choice.text


def test_O10_min_tokens_hold_back_the_end_while_the_grammar_goes_on(make_model, make_engine):
    engine = make_engine(ending(make_model))
    digits = {"regex": "[0-9]{1,40}"}
    short = complete(engine, [5], params(3, digits)).outputs[0]
    for count in (1, 10, 20):
        (choice,) = complete(engine, [5], params(3, digits, min_tokens=count)).outputs
        assert re.fullmatch("[0-9]{1,40}", choice.text)
        assert len(choice.token_ids) > count or choice.finish_reason == "stop"
        assert len(choice.text) >= min(count, 40)
    assert short.finish_reason == "stop"


def test_O10_a_stop_token_is_an_end_and_a_stop_string_cuts(make_model, make_engine, byte_level):
    engine = make_engine(make_model())
    (five,) = byte_level.encode("5")
    for seed in range(4):
        wanted = params(seed, {"regex": "[0-9]{3}|[0-9]{6}"}, stop_token_ids=[five])
        (choice,) = complete(engine, [5], wanted).outputs
        assert re.fullmatch("[0-46-9]{3}|[0-46-9]{6}", choice.text), "an end comes after three digits, not within them"
    (choice,) = complete(engine, [5], params(0, {"regex": "a{3}b{3}c{3}"}, stop="bb")).outputs
    assert (choice.text, choice.finish_reason) == ("aaa", "stop")


def test_O10_survives_preemption_chunks_neighbours_and_n(make_model, make_engine):
    """Every request in a small, busy pool writes what it writes alone."""
    model, rng = ending(make_model), random.Random(1)
    work = []
    for i, (wanted, _) in enumerate([*SHAPES[:3], ({}, None), *SHAPES[5:8]]):
        prompt = [rng.randrange(1, 321) for _ in range(rng.randrange(1, 40))]
        work.append((prompt, params(i, wanted or None, n=1 + i % 3, max_tokens=24, logprobs=1)))
    busy = make_engine(model, num_blocks=10, max_num_seqs=6, max_num_batched_tokens=24)
    for i, request in enumerate(work):
        busy.add_request(str(i), *request)
    found = run(busy)
    alone = make_engine(model, enable_prefix_caching=False)
    for i, request in enumerate(work):
        expected = complete(alone, *request)
        assert [c.token_ids for c in found[str(i)].outputs] == [c.token_ids for c in expected.outputs]
        assert [c.finish_reason for c in found[str(i)].outputs] == [c.finish_reason for c in expected.outputs]
    assert busy.stats().preemptions > 0
    assert len({tuple(choice.token_ids) for choice in found["5"].outputs}) > 1, "three choices of a number"


def test_O10_a_dead_end_ends_only_its_request(make_model, make_engine, byte_level):
    """The digits that the grammar wants are stop tokens, which may not come before it accepts."""
    model = ending(make_model)
    digits = [byte_level.encode(str(digit))[0] for digit in range(10)]
    other = params(5, {"choice": ["a long neighbour", "another one"]})
    (expected,) = complete(make_engine(model), [4, 5], other).outputs
    engine = make_engine(model)
    engine.add_request("stuck", [1, 2, 3], params(0, {"regex": "x[0-9]{9}y"}, stop_token_ids=digits, n=2))
    step_until_compiled(engine)
    engine.add_request("other", [4, 5], other)
    last = run(engine)
    stuck = last["stuck"]
    assert isinstance(stuck, FailedOutput)
    assert isinstance(stuck.error, RequestError)
    assert stuck.error.param == "structured_outputs.regex"
    assert "allows no token after 1" in str(stuck.error)
    assert stuck.outputs[0].text in ("x", "")
    assert {choice.finish_reason for choice in stuck.outputs} == {"abort"}
    assert last["other"].outputs[0].token_ids == expected.token_ids


def test_O10_a_token_that_the_grammar_refuses_is_a_dead_end_not_a_wrong_text(make_model, make_engine, byte_level):
    engine = make_engine(make_model())
    engine.add_request("x", [1, 2], params(0, {"choice": ["ab"]}))
    step_until_compiled(engine).accept(byte_level.encode("z")[0])  # as if it had been sampled
    failed = run(engine)["x"]
    assert isinstance(failed, FailedOutput)
    assert re.search(r"allows no token after \d \(.*fails parse", str(failed.error))


def test_a_request_waits_for_its_grammar_while_others_run(make_model, make_engine):
    engine = make_engine(make_model(), grammar_timeout=1.5)
    engine.add_request("stuck", [1, 2], params(0, {"json": ENDLESS}))
    engine.add_request("free", [1, 2], params(0, max_tokens=5))
    begin, seen, steps = time.monotonic(), [], 0
    while engine.has_unfinished:
        seen += engine.step()
        steps += 1
        stats = engine.stats()
        assert stats.waiting + stats.running <= 2
    assert [output.request_id for output in seen] == ["free"] * 5 + ["stuck"]
    error = seen[-1].error
    assert (error.param, "1.5 s" in str(error)) == ("structured_outputs.json", True)
    took = time.monotonic() - begin
    assert took > 1.0
    assert steps < 100 * took + 20, "it rests while only a grammar is awaited"


@pytest.mark.parametrize("how", ["abort", "abort_all", "deadline", "twice"])
def test_A6_abort_while_waiting_for_a_grammar_leaves_nothing(make_model, make_engine, how):
    engine = make_engine(make_model(), grammar_timeout=10.0, max_waiting=2)
    deadline = 1.0 if how == "deadline" else None
    prepared = engine.prepare("x", [1, 2], params(0, {"json": ENDLESS}, n=2), deadline=deadline)
    engine.add(prepared)
    with pytest.raises(QueueFullError):
        engine.add_request("third", [1], params())
    for _ in range(2):
        assert not engine.step()
    assert engine.stats().waiting == 2
    if how == "deadline":
        output = run(engine)["x"]
        assert isinstance(output.error, QueueTimeoutError)
    else:
        output = engine.abort_all()[0] if how == "abort_all" else engine.abort("x")
        assert engine.abort("x") is None
    assert [choice.finish_reason for choice in output.outputs] == ["abort"] * 2
    assert not engine.has_unfinished
    assert not engine._compiling
    assert not engine.scheduler.held
    if how == "twice":
        engine.add_request("x", [1, 2], params(0, {"choice": ["a new life"]}))
        assert run(engine)["x"].outputs[0].text == "a new life"


def test_I2_no_matcher_outlives_its_request(make_model, make_engine, monkeypatch):
    made: list[weakref.ref[GrammarMatcher]] = []
    original = GrammarMatcher.__init__

    def watched(self: GrammarMatcher, *args: Any) -> None:
        original(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(GrammarMatcher, "__init__", watched)
    engine = make_engine(make_model(), num_blocks=16)
    for i, (wanted, _) in enumerate(SHAPES):
        engine.add_request(str(i), [1, 2, 3 + i], params(i, wanted, n=2, max_tokens=30))
    for i in (0, 5):
        engine.step()
        engine.abort(str(i))
    run(engine)
    gc.collect()
    assert len(made) >= 2 * len(SHAPES) - 4
    assert [ref for ref in made if ref() is not None] == []


def test_the_wrong_kind_of_constraint_is_refused():
    with pytest.raises(RequestError, match="structured_outputs") as caught:
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
    assert caught.value.param == "structured_outputs"


def test_O9_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(make_model, make_engine):
    """Two hostile ones occupy the workers; those behind them that have been aborted cost the next one nothing."""
    engine = make_engine(make_model(), grammar_timeout=1.0)
    hostile = [{"json": ENDLESS | {"title": str(i)}} for i in range(30)]
    for i, wanted in enumerate(hostile):
        engine.add_request(str(i), [1, 2], params(0, wanted))
    engine.step()
    for i in range(2, len(hostile)):
        engine.abort(str(i))
    engine.add_request("shared", [1, 2], params(0, {"choice": ["one"]}))
    engine.add_request("last", [1, 2], params(0, {"choice": ["one"]}))
    engine.abort("shared")
    begin = time.monotonic()
    assert run(engine)["last"].outputs[0].text == "one", "also where an equal one was given up"
    assert time.monotonic() - begin < 14, "28 would take two workers that long"
    engine.add_request("again", [1, 2], params(0, hostile[5]))
    assert "1.0 s" in str(run(engine)["again"].error), "what was not compiled is not known either"


def test_close_ends_the_processes_that_compile(make_model, make_engine):
    engine = make_engine(make_model())
    complete(engine, [1, 2], params(0, {"choice": ["one"]}))
    children = [p._child for p in engine._compiling._compiler._processes if p._child is not None]
    assert children
    engine.close()
    assert all(child.wait(10) for child in children)
