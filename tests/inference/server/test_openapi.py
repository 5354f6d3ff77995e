"""The description of the API is valid, whole and true: of every route, of every field, of real answers."""

import jsonschema_rs
import pytest

from turnout.inference.server import openapi
from turnout.inference.server.app import ROUTES
from turnout.inference.server.protocol import ChatRequest, CompletionRequest

from .conftest import NAME, Running

OPEN = ("/health", "/ready", "/", "/console/{name}")
MESSAGES = [{"role": "user", "content": "naïve?"}]


@pytest.fixture(scope="module")
def document(served: Running) -> dict:
    answer = served.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def validator(document: dict, schema: dict) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(schema | {"components": document["components"]})


def body(document: dict, path: str) -> jsonschema_rs.Draft202012Validator:
    return validator(document, document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])


def test_every_route_is_described_and_nothing_else(document):
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == {(method, path.replace(":path", "")) for method, path, _ in ROUTES} == set(openapi.OPERATIONS)
    assert document["openapi"] == "3.1.0"
    for schema in document["components"]["schemas"].values():
        assert jsonschema_rs.meta.is_valid(schema)


def test_every_number_is_bounded_and_every_field_is_there(document):
    schemas = document["components"]["schemas"]
    for model in (CompletionRequest, ChatRequest):
        schema = schemas[model.__name__]
        assert set(schema["properties"]) == model.model_fields.keys() | model.neutral.keys()
        assert schema["additionalProperties"] is False
    todo = [schemas["CompletionRequest"], schemas["ChatRequest"], schemas["Detokenize"]]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if value.get("type") in ("integer", "number"):
                assert "maximum" in value, value
                assert value.keys() & {"minimum", "exclusiveMinimum"}, value
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    ids = schemas["Detokenize"]["properties"]["tokens"]["items"]
    assert (ids["minimum"], ids["maximum"]) == (0, 320)
    assert schemas["CompletionRequest"]["properties"]["model"]["enum"] == [NAME]
    assert schemas["CompletionRequest"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 256


@pytest.mark.parametrize(
    ("path", "fields", "good"),
    [
        ("/v1/completions", {"prompt": "x", "stop": ["a"], "logit_bias": {"5": 1}, "user": 5, "best_of": 1}, True),
        ("/v1/completions", {"prompt": [[1], [2]], "stop": "a", "seed": None, "truncate_prompt_tokens": 3}, True),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "a", "json": None}}, True),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, False),
        ("/v1/completions", {"prompt": ""}, False),
        ("/v1/completions", {"prompt": [321]}, False),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, False),
        ("/v1/completions", {"prompt": "x", "colour": 2}, False),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"x": 1}}, False),
        ("/v1/completions", {"prompt": "x", "truncate_prompt_tokens": 0}, False),
        ("/v1/completions", {"prompt": "x", "n": 0}, False),
        ("/v1/completions", {"prompt": "x", "stop": ""}, False),
        ("/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "auto", "tools": None}, True),
        ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "text"}}, True),
        ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, False),
        ("/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "any"}, False),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "tool_call_id": "x"}]}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "tool_calls": []}]}, True),
        ("/v1/chat/completions", {"messages": [{"role": "wizard"}]}, False),
        ("/tokenize", {"prompt": ""}, True),
        ("/tokenize", {"messages": MESSAGES}, True),
        ("/tokenize", {"messages": MESSAGES, "prompt": "x"}, False),
        ("/detokenize", {"tokens": [0, 320]}, True),
        ("/detokenize", {"tokens": [321]}, False),
    ],
    ids=str,
)
def test_a_body_is_good_by_the_description_where_it_is_served(served: Running, document, path, fields, good):
    fields = {"model": NAME} | ({"max_tokens": 2} if path.startswith("/v1") else {}) | fields
    assert body(document, path).is_valid(fields) == good
    assert served.http.post(path, json=fields).status_code == (200 if good else 400)


def test_real_answers_are_those_described(served: Running, document):
    sampled = {"max_tokens": 3, "logprobs": 2, "prompt_logprobs": 1, "echo": True, "return_token_ids": True}
    chat = {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "routed_experts": True}
    posts = [
        ("/v1/completions", {"prompt": ["x", "yz"], "n": 2} | sampled),
        ("/v1/chat/completions", chat | {"return_token_ids": True, "prompt_logprobs": 1}),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/completions", {"prompt": 5}),
        ("/v1/embeddings", {}),
    ]
    found = [("post", path, served.post(path, **fields)) for path, fields in posts]
    gets = [path for method, path in openapi.OPERATIONS if method == "GET"]
    found += [("get", path, served.get(path.replace("{name}", NAME))) for path in gets]
    for method, path, answer in found:
        described = document["paths"][path][method]["responses"][str(answer.status_code)]["content"]
        kind = answer.headers["content-type"].partition(";")[0]
        if kind == "application/json":
            validator(document, described[kind]["schema"]).validate(answer.json())
        else:
            assert kind in described
    described = document["paths"]["/version"]["get"]["responses"]["200"]["content"]["application/json"]
    assert not validator(document, described["schema"]).is_valid({"version": 5})


def test_a_key_is_described_where_it_is_asked_for(serve):
    served = serve(server={"api_key": "secret"})
    assert served.get("/openapi.json").status_code == 401
    document = served.http.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, item in document["paths"].items():
        for operation in item.values():
            assert ("401" in operation["responses"]) == ("security" in operation) == (path not in OPEN)
