"""What a body says about the shape of the text: vLLM's `structured_outputs`, OpenAI's `response_format`."""

from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue

from ... import RequestError
from ..core.structured import KINDS, MAX_CHARS, StructuredOutputs
from .errors import ApiError
from .strict import Strict

ANY_OBJECT = {"type": "object"}
SET: dict[str, Any] = {"not": {"type": "null"}}
Schema = dict[str, JsonValue]
Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARS)]


class Shape(Strict):
    """`structured_outputs` as bodies have it: one of the four."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [k], "properties": {k: SET}} for k in KINDS]})

    json_: Annotated[Schema | Text | None, Field(alias="json")] = None
    regex: Text | None = None
    grammar: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None


class NamedSchema(Strict):
    """A JSON Schema and what it is called."""

    name: Annotated[str, Field(min_length=1)]
    description: JsonValue = None
    strict: bool | None = None
    schema_: Annotated[Schema, Field(alias="schema")]


class ResponseFormat(Strict):
    """`response_format` as bodies have it; the schema goes with the type json_schema."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"type": {"const": "json_schema"}}},
            "then": {"required": ["json_schema"], "properties": {"json_schema": SET}},
            "else": {"properties": {"json_schema": {"type": "null"}}},
        }
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


def read_structured_outputs(value: object) -> StructuredOutputs:
    """`{"json" | "regex" | "grammar" | "choice": ...}`.

    Raises:
        ApiError: 400 naming the field.
    """
    fields = _fields(value, "structured_outputs", set(KINDS))
    return _built({name: given for name, given in fields.items() if given is not None}, "structured_outputs")


def read_response_format(value: object) -> StructuredOutputs | None:
    """`{"type": "text" | "json_object" | "json_schema", ...}`; None = any text. A schema holds strict or not.

    Raises:
        ApiError: 400 naming the field.
    """
    param = "response_format"
    fields = _fields(value, param, {"type", "json_schema"})
    kind = fields.get("type")
    if kind == "json_schema":
        return _schema(fields.get("json_schema"), f"{param}.json_schema")
    if kind not in ("text", "json_object"):
        raise _bad(f"{param}.type", f"({kind!r}) must be text, json_object or json_schema")
    if fields.get("json_schema") is not None:
        raise _bad(f"{param}.json_schema", f"does not go with the type {kind}: leave it out")
    return _built({"json": ANY_OBJECT}, param) if kind == "json_object" else None


def _schema(value: object, param: str) -> StructuredOutputs:
    fields = _fields(value, param, {"name", "description", "schema", "strict"})
    name, strict, schema = fields.get("name"), fields.get("strict"), fields.get("schema")
    if not isinstance(name, str) or not name:
        raise _bad(f"{param}.name", "must be a text of at least one character")
    if strict is not None and not isinstance(strict, bool):
        raise _bad(f"{param}.strict", "must be true or false")
    if not isinstance(schema, dict):
        raise _bad(f"{param}.schema", "must be a JSON Schema: an object")
    return _built({"json": schema}, f"{param}.schema")


def _fields(value: object, param: str, known: Set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _bad(param, "must be an object")
    for name in value:
        if name not in known:
            raise ApiError(400, f"{param}.{name} is not served: leave it out", param=param, code="unknown_parameter")
    return value


def _built(fields: Mapping[str, Any], param: str) -> StructuredOutputs:
    try:
        return StructuredOutputs(**fields, param=param)
    except RequestError as error:
        raise ApiError(400, str(error), param=error.param, code="invalid_value") from error


def _bad(param: str, rule: str) -> ApiError:
    return ApiError(400, f"{param} {rule}", param=param, code="invalid_value")
