"""Requests made from `/openapi.json`, right and wrong: no 5xx, no status that is not documented, no other shape."""

from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from turnout.inference.server.openapi import OPERATIONS
from turnout.tests.helpers.waiting import eventually

from .conftest import Running, run_server

RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
SMALL = {"n": 3, "max_tokens": 4, "max_completion_tokens": 4}
"""Fields → the most that is asked for: the point is not to generate much."""
BODIES = [path for (_, path), operation in OPERATIONS.items() if operation.body]
WITH_INPUT = [
    key
    for key, operation in OPERATIONS.items()
    if operation.body or any(parameter["in"] == "query" for parameter in operation.parameters)
]
"""What can be wrong: a name in a path can be anything."""


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """Schemathesis keeps notes in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def target(model, byte_level):
    with run_server(model, byte_level, {}) as running:
        yield running


@pytest.fixture(scope="module")
def document(target) -> dict[str, Any]:
    found = target.get("/openapi.json").json()
    for schema in found["components"]["schemas"].values():
        for name, most in SMALL.items():
            if name in schema.get("properties", {}):
                schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": most}
                schema["required"] = [*schema["required"], name] if name == "max_tokens" else schema["required"]
    for path in BODIES:  # schemathesis reads a stream's events one by one, for which OpenAPI 3.1 has no words
        found["paths"][path]["post"]["responses"]["200"]["content"].get("text/event-stream", {}).pop("schema", None)
    return found


def attack(
    served: Running, document: dict, method: str, path: str, mode: GenerationMode, most: int, *, derandomize: bool
) -> set[int]:
    """Send up to `most` requests of one kind; the statuses of the answers."""
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses = set()

    @hypothesis.settings(
        max_examples=most,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(operation.as_strategy(mode))
    def run(case: schemathesis.Case) -> None:
        statuses.add(case.call_and_validate(base_url=served.url, checks=CHECKS, timeout=60).status_code)

    run()
    assert eventually(served.idle)
    return statuses


@pytest.mark.parametrize("path", BODIES)
def test_requests_of_the_document_get_what_it_says(target, document, path):
    assert attack(target, document, "POST", path, WRONG, 8, derandomize=True) & {400, 415}
    assert attack(target, document, "POST", path, RIGHT, 8, derandomize=True)


@pytest.mark.full
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_many_right_requests_get_what_it_says(target, document, method, path):
    statuses = attack(target, document, method, path, RIGHT, 150, derandomize=False)
    assert statuses & {200, 400 if path == "/v1/embeddings" else 200, 404 if "{" in path else 200, 415}


@pytest.mark.full
@pytest.mark.parametrize(("method", "path"), WITH_INPUT)
def test_many_wrong_requests_get_what_it_says(target, document, method, path):
    assert attack(target, document, method, path, WRONG, 150, derandomize=False)
