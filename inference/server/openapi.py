"""`/openapi.json`: what is served, as OpenAPI 3.1, built from the models that read the requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from ... import __version__
from . import history, protocol, responses, tokens
from .errors import json_response
from .service import Service
from .shell import is_open

TEMPLATE = "#/components/schemas/{model}"
ALWAYS = (400, 408, 413, 414, 431, 500, 503)
"""What any request may get: a bad or slow head or body, a server that has no room or is at its end."""
WITH_BODY = (415,)
WITH_MODEL = (404,)
GENERATING = (429, 499)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One route.

    Args:
        summary: what it does.
        body: the models that may read its body; none = it has no body.
        answer: the model of a 200; None = what it answers is no JSON, or it only refuses.
        errors: beside those of any request.
        parameters: of path and query.
        text: the media type of another 200.
    """

    summary: str
    body: Sequence[type[BaseModel]] = ()
    answer: type[BaseModel] | None = None
    errors: Sequence[int] = ()
    parameters: Sequence[dict[str, Any]] = ()
    text: str | None = None


GENERATE = (*WITH_BODY, *WITH_MODEL, *GENERATING)
TOKENIZE = (*WITH_BODY, *WITH_MODEL)
SECONDS = {
    "name": "seconds",
    "in": "query",
    "description": "length of the window",
    "schema": {"type": "integer", "minimum": 1, "maximum": history.LONGEST},
}
SINCE = {
    "name": "since",
    "in": "query",
    "description": "the number of the last step that is known",
    "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
}
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "format": "model"}}
FILE = NAME | {"schema": {"type": "string", "pattern": "^[a-z]+[.][a-z]+$"}}
STREAM = "text/event-stream"
OPERATIONS = {
    ("POST", "/v1/completions"): Operation(
        summary="go on with a text",
        body=[protocol.CompletionRequest],
        answer=responses.Completion,
        errors=GENERATE,
        text=STREAM,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        summary="answer a chat", body=[protocol.ChatRequest], answer=responses.Chat, errors=GENERATE, text=STREAM
    ),
    ("POST", "/v1/embeddings"): Operation(summary="refused: a language model has none", errors=WITH_BODY),
    ("POST", "/tokenize"): Operation(
        summary="tokens of a text or a chat",
        body=[tokens.TokenizeText, tokens.TokenizeChat],
        answer=responses.Tokens,
        errors=TOKENIZE,
    ),
    ("POST", "/detokenize"): Operation(
        summary="text of tokens", body=[tokens.Detokenize], answer=responses.Text, errors=TOKENIZE
    ),
    ("GET", "/v1/models"): Operation(summary="the model", answer=responses.Models),
    ("GET", "/v1/models/{name}"): Operation(
        summary="the model by its name", answer=responses.Model, errors=WITH_MODEL, parameters=[NAME]
    ),
    ("GET", "/v1/experts"): Operation(
        summary="load of every layer's experts, since start and lately",
        answer=responses.ExpertsLoad,
        errors=WITH_MODEL,
        parameters=[SECONDS],
    ),
    ("GET", "/v1/console/state"): Operation(
        summary="the engine's state, for the console", answer=responses.ConsoleNumbers
    ),
    ("GET", "/v1/console/steps"): Operation(
        summary="the engine's last steps, for the console", answer=responses.ConsoleNumbers, parameters=[SINCE]
    ),
    ("GET", "/"): Operation(summary="the console", text="text/html"),
    ("GET", "/console/{name}"): Operation(summary="the console's files", text="*/*", errors=(404,), parameters=[FILE]),
    ("GET", "/health"): Operation(summary="whether the process works", answer=responses.Status),
    ("GET", "/ready"): Operation(summary="whether requests are taken", answer=responses.Status),
    ("GET", "/load"): Operation(summary="calls in flight", answer=responses.ServerLoad),
    ("GET", "/version"): Operation(summary="Turnout's version", answer=responses.Version),
    ("GET", "/metrics"): Operation(summary="metrics for Prometheus", text="text/plain"),
    ("GET", "/openapi.json"): Operation(summary="this document", text="application/json"),
}


async def openapi(service: Service, request: Request) -> Response:
    """`GET /openapi.json`; sizes of the model are in it once it is loaded."""
    engine = service.engine
    sizes = (None, None) if engine is None else (engine.model_config.vocab_size, engine.config.max_model_len)
    return json_response(document(service.model_name, *sizes, keyed=service.config.api_key is not None))


def document(model: str, vocabulary: int | None, context: int | None, *, keyed: bool) -> dict[str, Any]:
    """The API's description.

    Args:
        model: the one name that requests may have.
        vocabulary, context: bounds of token ids and of tokens to generate; None = not known yet.
        keyed: requests need the key.
    """
    read = [body for operation in OPERATIONS.values() for body in operation.body]
    said = [operation.answer for operation in OPERATIONS.values() if operation.answer is not None]
    models: list[type[BaseModel]] = [*read, *said, responses.Error]
    names, found = models_json_schema([(kind, "validation") for kind in dict.fromkeys(models)], ref_template=TEMPLATE)
    references: dict[Any, dict[str, Any]] = {kind: reference for (kind, _), reference in names.items()}
    paths: dict[str, Any] = {}
    for (method, path), operation in OPERATIONS.items():
        described = _operation(operation, references, keyed and not is_open(path))
        paths.setdefault(path, {})[method.lower()] = _bounded(described, model, vocabulary, context)
    schemas = {name: _bounded(schema, model, vocabulary, context) for name, schema in found["$defs"].items()}
    security = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Turnout", "version": __version__, "description": f"OpenAI's API, serving {model}."},
        "paths": paths,
        "components": {"schemas": schemas} | security,
    }


def _operation(operation: Operation, references: dict[Any, dict[str, Any]], keyed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"summary": operation.summary, "responses": {}}
    if operation.parameters:
        found["parameters"] = list(operation.parameters)
    if operation.body:
        schemas = [references[body] for body in operation.body]
        schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": references[operation.answer]}
    if operation.text is not None:
        content[operation.text] = {"schema": {"type": "object" if "json" in operation.text else "string"}}
    if content:
        found["responses"]["200"] = {"description": "OK", "content": content}
    error = references[responses.Error]
    for status in sorted({*ALWAYS, *operation.errors, *((401,) if keyed else ())}):
        schema = {"anyOf": [error, references[responses.Status]]} if operation.answer is responses.Status else error
        content = {"application/json": {"schema": schema}}
        found["responses"][str(status)] = {"description": _phrase(status), "content": content}
    if keyed:
        found["security"] = [{"key": []}]
    return found


def _phrase(status: int) -> str:
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase


def _bounded(schema: Any, model: str, vocabulary: int | None, context: int | None) -> Any:
    """The schema with what this server's one model makes of it."""
    if isinstance(schema, list):
        return [_bounded(value, model, vocabulary, context) for value in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _bounded(value, model, vocabulary, context) for key, value in schema.items()}
    if found.get("format") == "token-id" and vocabulary is not None:
        found["maximum"] = vocabulary - 1
    if found.get("format") == "tokens" and context is not None:
        found["maximum"] = context
    if found.get("format") == "model":
        found["enum"] = [model]
    return found
