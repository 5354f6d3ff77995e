"""The tools of a chat's request, which of them must be called, and the grammar that holds the model to it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from ... import RequestError
from ..core.structured import StructuredOutputs
from .errors import ApiError
from .strict import Strict, bad

MAX_NAME = 64
MAX_CALLS = 32
"""Calls of one answer where one at least is required."""
DEFINITIONS = ("$defs", "definitions")

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]+$", max_length=MAX_NAME)]


def _no_parameters() -> dict[str, JsonValue]:
    return {"type": "object", "properties": {}}


class Function(Strict):
    """What a model may call.

    `strict` is accepted either way: a call that is required has the schema's form, a free one is the model's own words.
    """

    neutral: ClassVar[Mapping[str, Sequence[object]]] = {"strict": (True, False)}

    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=_no_parameters)


class Tool(Strict):
    """A tool as OpenAI has it: a function."""

    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """As templates show it to the model."""
        name, description = self.function.name, self.function.description
        described = {} if description is None else {"description": description}
        return {"type": self.type, "function": {"name": name} | described | {"parameters": self.function.parameters}}


class FunctionReference(Strict):
    """A function's name."""

    name: FunctionName


class NamedChoice(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionReference


Keyword = Literal["none", "auto", "required"]
ToolChoice = Keyword | NamedChoice


def read_tool_choice(value: object) -> ToolChoice:
    """`"none"`, `"auto"`, `"required"` or `{"type": "function", "function": {"name": ...}}`."""
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name), **others}, **more} if not (others or more):
            return NamedChoice(type="function", function=FunctionReference.model_construct(name=name))
    raise bad('must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')


def check_tool_choice(tools: Sequence[Tool], choice: ToolChoice | None, shaped: bool) -> None:
    """Raise ApiError 400 where `choice` asks for what can not be; `shaped`: the text's shape is given otherwise."""
    if choice in (None, "none", "auto"):
        return
    if isinstance(choice, NamedChoice) and choice.function.name not in [tool.function.name for tool in tools]:
        rule = f"({choice.function.name}) must be a function of tools: name one that is there"
    elif not tools:
        rule = "(required) needs tools: add one"
    elif shaped:
        rule = "that forces a call excludes response_format and structured_outputs: set one"
    else:
        return
    raise _refused("tool_choice", rule)


def forced_shape(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool) -> StructuredOutputs | None:
    """What the text must look like for a call to be in it: a named function's arguments, or a list of calls.

    Raises:
        ApiError: 400, schemas that can not stand beside each other, or that are none.
    """
    if isinstance(choice, NamedChoice):
        (named,) = [tool.function for tool in tools if tool.function.name == choice.function.name]
        return _structured(_object(named.parameters))
    if choice != "required":
        return None
    definitions: dict[str, dict[str, JsonValue]] = {}
    calls = [_call(tool.function, definitions) for tool in tools]
    most = MAX_CALLS if parallel else 1
    return _structured({"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}} | definitions)


def _call(function: Function, definitions: dict[str, dict[str, JsonValue]]) -> dict[str, JsonValue]:
    """One function's call as a schema; what its own schema defines moves to the root, where references look."""
    own = dict(function.parameters)
    for key in DEFINITIONS:
        for name, schema in _members(own.pop(key, {})):
            if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
                raise _refused("tools", f"define {name} ({key}) differently: give one another name")
    for reference in _references(own):
        if not str(reference).startswith(tuple(f"#/{key}/" for key in DEFINITIONS)):
            rule = f"of {function.name} refer to {str(reference)[:80]}: move it to $defs, or name the tool_choice"
            raise _refused("tools", f"parameters {rule}")
    fields: dict[str, JsonValue] = {"name": {"const": function.name}, "arguments": _object(own)}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _object(schema: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Arguments are an object, whether or not their schema says so."""
    return {"type": "object"} | dict(schema)


def _members(value: JsonValue) -> list[tuple[str, JsonValue]]:
    if not isinstance(value, dict):
        raise _refused("tools", "must have objects as $defs: correct the schema")
    return list(value.items())


def _references(schema: JsonValue) -> list[JsonValue]:
    """Every `$ref` in a schema."""
    found, todo = [], [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            found += [value["$ref"]] if "$ref" in value else []
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return found


def _structured(schema: dict[str, Any]) -> StructuredOutputs:
    try:
        return StructuredOutputs(json=schema, param="tools")
    except RequestError as error:
        raise _refused("tools", str(error).removeprefix("tools ")) from error


def _refused(param: str, rule: str) -> ApiError:
    return ApiError(400, f"{param} {rule}", param=param, code="invalid_value")
