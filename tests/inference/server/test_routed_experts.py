"""`routed_experts` over HTTP: the engine's rows, in the answer or as they come in each choice's chunks."""
# ruff: noqa: N802 (M6 is the name of a rule)

import pytest

from turnout.inference.config import EngineConfig
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine

from .conftest import ENGINE, SLOW, Running

PROMPT = "The import statement"
WISH = {"max_tokens": 6, "n": 2, "seed": 3, "routed_experts": True}


@pytest.fixture(scope="module")
def expected(model, byte_level) -> list[list[list[list[int]]]]:
    engine = Engine(model, byte_level, EngineConfig(**ENGINE))
    engine.add_request("x", PROMPT, SamplingParams(**WISH))
    outputs = []
    while engine.has_unfinished:
        outputs = engine.step() or outputs
    return [choice.routed_experts.tolist() for choice in outputs[-1].outputs]


def test_M6_an_answer_has_the_engine_s_rows(served: Running, expected):
    answer = served.post(prompt=PROMPT, **WISH).json()
    assert [choice["routed_experts"] for choice in answer["choices"]] == expected
    assert len(expected[0]) == answer["usage"]["prompt_tokens"] + 6 - 1


@pytest.mark.parametrize("echo", [False, True])
def test_M6_a_stream_s_chunks_put_together_have_them(served: Running, expected, echo, monkeypatch):
    monkeypatch.setattr(served.engine, "pace", SLOW)
    found: dict[int, list] = {}
    chunks = 0
    for frame in served.stream(prompt=PROMPT, echo=echo, **WISH)[:-1]:
        (choice,) = frame["choices"]
        found.setdefault(choice["index"], []).extend(choice["routed_experts"])
        chunks += bool(choice["routed_experts"])
    assert [found[index] for index in sorted(found)] == expected
    assert chunks > len(found), "they come as they are known, not at the end"


def test_a_chat_has_them_too_and_nobody_who_does_not_ask(served: Running):
    messages = [{"role": "user", "content": PROMPT}]
    asked = served.post("/v1/chat/completions", messages=messages, max_tokens=2, routed_experts=True).json()
    assert len(asked["choices"][0]["routed_experts"]) == asked["usage"]["total_tokens"] - 1
    plain = served.post("/v1/chat/completions", messages=messages, max_tokens=2).json()
    assert "routed_experts" not in plain["choices"][0]
