"""What is wrong with a constraint by itself is an error at birth that names it; no library is asked."""

import json
import sys

import pytest

from turnout import RequestError
from turnout.inference.core.structured import MAX_CHARS, MAX_NESTING, StructuredOutputs


def nested(levels: int) -> dict:
    schema = {"type": "integer"}
    for _ in range(levels - 1):
        schema = {"type": "array", "items": schema}
    return schema


def objects(levels: int) -> dict:
    schema = {"type": "integer"}
    for _ in range(levels - 1):
        schema = {"type": "object", "properties": {"inner": schema}}
    return schema


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({}, "structured_outputs", "nothing"),
        ({"json": {}, "regex": "a"}, "structured_outputs", "json, regex"),
        ({"json": "{"}, "structured_outputs.json", "not JSON"),
        ({"json": "[" * 10_000}, "structured_outputs.json", "not JSON"),
        ({"json": "[]"}, "structured_outputs.json", "an object"),
        ({"json": True}, "structured_outputs.json", "an object"),
        ({"json": {"a": {1, 2}}}, "structured_outputs.json", "as JSON"),
        ({"json": {"a": float("nan")}}, "structured_outputs.json", "as JSON"),
        ({"json": nested(MAX_NESTING + 1)}, "structured_outputs.json", "16 levels"),
        ({"json": json.dumps(objects(MAX_NESTING + 1))}, "structured_outputs.json", "16 levels"),
        ({"json": {"enum": ["x" * MAX_CHARS]}}, "structured_outputs.json", str(MAX_CHARS)),
        ({"json": " " * 10**6}, "structured_outputs.json", str(MAX_CHARS)),
        ({"regex": ""}, "structured_outputs.regex", "at least one"),
        ({"regex": 3}, "structured_outputs.regex", "text"),
        ({"regex": "a" * (MAX_CHARS + 1)}, "structured_outputs.regex", str(MAX_CHARS)),
        ({"regex": "\ud800"}, "structured_outputs.regex", "surrogate"),
        ({"grammar": ""}, "structured_outputs.grammar", "at least one"),
        ({"choice": []}, "structured_outputs.choice", "not empty"),
        ({"choice": "ab"}, "structured_outputs.choice", "list"),
        ({"choice": ["a", ""]}, "structured_outputs.choice", "at least one"),
        ({"choice": ["a", None]}, "structured_outputs.choice", "at least one"),
        ({"choice": ["\ud800"]}, "structured_outputs.choice", "surrogate"),
        ({"json": "{", "param": "response_format"}, "response_format", "not JSON"),
    ],
)
def test_what_can_not_be_is_refused_by_name(given, param, said):
    with pytest.raises(RequestError, match=said) as caught:
        StructuredOutputs(**given)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_deep_but_allowed_schemas_pass():
    for schema in (nested(MAX_NESTING), objects(MAX_NESTING)):
        assert json.loads(StructuredOutputs(json=schema).text) == schema


def test_a_bottomless_schema_is_refused_without_recursion():
    bottomless = deep = {}
    for _ in range(10 * sys.getrecursionlimit()):
        deep["properties"] = {"properties": {}}
        deep = deep["properties"]["properties"]
    with pytest.raises(RequestError, match="levels"):
        StructuredOutputs(json=bottomless)


def test_a_schema_as_a_dict_is_the_schema_as_text_and_the_name_does_not_count():
    schema = {"type": "object", "properties": {"é": {"type": "null"}}}
    as_dict, as_text = StructuredOutputs(json=schema), StructuredOutputs(json=json.dumps(schema), param="other")
    assert as_dict == as_text
    assert hash(as_dict) == hash(as_text)
    assert (as_dict.kind, StructuredOutputs(choice=["a", "b"]).text) == ("json", '["a", "b"]')
