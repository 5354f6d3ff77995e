"""Structured output over HTTP: OpenAI's and vLLM's spellings, what is refused, and who notices."""
# ruff: noqa: N802 (O9 is the name of a rule)

import json
import re
import threading

import pytest

from turnout.tests.helpers.waiting import eventually

from .conftest import NAME, SLOW, Running
from .test_abort import open_call

PERSON = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
ENDLESS = {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]}
MESSAGES = [{"role": "user", "content": "Who is there?"}]


def schema(of: dict, **changes) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": of} | changes}


def chat(served: Running, **body):
    return served.post("/v1/chat/completions", **({"messages": MESSAGES, "max_tokens": 150} | body))


@pytest.mark.parametrize("strict", [True, False, None])
def test_O10_a_chat_answers_in_the_schema_of_its_response_format(served, strict):
    answer = served.client().chat.completions.create(
        model=NAME, messages=MESSAGES, n=3, seed=1, max_tokens=150, response_format=schema(PERSON, strict=strict)
    )
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"ok", "n"}
        assert 0 <= value["n"] <= 99
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ({"choice": ["yes", "naïve"]}, "yes|naïve"),
        ({"regex": "a[0-9]{2}"}, "a[0-9]{2}"),
        ({"grammar": 'start: "<" /[a-c]{1,3}/ ">"'}, "<[a-c]{1,3}>"),
        ({"json": {"enum": [1, None]}, "regex": None}, "1|null"),
    ],
)
def test_O10_a_completion_has_the_wanted_shape_streamed_or_not(served, shape, pattern):
    body = {"prompt": ["one", "two"], "seed": 5, "max_tokens": 60, "structured_outputs": shape, "n": 2}
    whole = served.post(**body).json()["choices"]
    assert all(re.fullmatch(pattern, choice["text"]) for choice in whole)
    streamed = [""] * len(whole)
    for frame in served.stream(**body)[:-1]:
        for choice in frame["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in whole]


def test_O10_any_object_and_any_text(served):
    answer = chat(served, response_format={"type": "json_object"}, seed=3, max_tokens=20)
    text = answer.json()["choices"][0]["message"]["content"]
    assert text.startswith("{")
    bodies = ({}, {"response_format": {"type": "text"}})
    plain = [chat(served, seed=3, max_tokens=20, **body).json()["choices"] for body in bodies]
    assert plain[0] == plain[1]


DEEP: dict = {"type": "null"}
for _ in range(17):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "colour": 1}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": schema(PERSON, name="")}, "response_format.json_schema.name"),
        ({"response_format": schema(PERSON, strict=1)}, "response_format.json_schema.strict"),
        ({"response_format": schema([])}, "response_format.json_schema.schema"),
        ({"response_format": schema(DEEP)}, "response_format.json_schema.schema"),
        ({"response_format": schema({"type": "strin"})}, "response_format.json_schema.schema"),
        ({"response_format": schema({"enum": ["x" * 10**5]})}, "response_format.json_schema.schema"),
        ({"response_format": schema(PERSON), "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "((("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"guided_json": {}}, "guided_json"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_O9_a_bad_shape_is_refused_by_name(served, body, param):
    answer = chat(served, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(answer.content) < 1000


def test_O9_hostile_shapes_are_refused_in_time_while_another_request_streams(serve):
    served = serve(grammar_timeout=1.0)
    assert served.post(prompt="x", structured_outputs={"choice": ["the compilers run"]}).status_code == 200
    served.engine.pace = SLOW
    frames: list[str] = []

    def read() -> None:
        body = {"model": NAME, "prompt": "The list", "max_tokens": 240, "stream": True, "ignore_eos": True}
        with served.http.stream("POST", "/v1/completions", json=body) as answer:
            frames.extend(line for line in answer.iter_lines() if line.startswith("data: {"))

    reader = threading.Thread(target=read)
    reader.start()
    assert eventually(lambda: len(frames) > 3)
    hostile = {
        "1.0 s": {"json": ENDLESS},
        "1.0": {"regex": "|".join(str(i * 7919) for i in range(6000))},
        "65536": {"regex": "a" * 10**6},
        "16 levels": {"json": DEEP},
        "nested": {"grammar": "start: " + "(" * 20_000 + '"x"' + ")" * 20_000},
    }
    for said, shape in hostile.items():
        before = len(frames)
        answer = served.post(prompt="x", max_tokens=4, structured_outputs=shape)
        cheap = said == "1.0" and answer.status_code == 200
        assert cheap or (answer.status_code == 400 and said in answer.json()["error"]["message"]), answer.text
        assert said != "1.0 s" or len(frames) > before + 3, "nobody's stream waits for a grammar"
    served.engine.pace = 0.0
    reader.join(60)
    assert '"finish_reason":"length"' in frames[-1]
    assert served.post(prompt="x", structured_outputs={"choice": ["still here"]}).json()["choices"][0]["text"]


def test_A6_a_client_that_leaves_while_its_grammar_compiles_leaves_nothing(serve):
    served = serve(grammar_timeout=600.0)
    client = open_call(served, structured_outputs={"json": ENDLESS})
    assert eventually(lambda: served.engine.stats().waiting == 1)
    client.close()
    assert eventually(served.idle), "long before the grammar is given up"
    assert not served.engine._compiling
