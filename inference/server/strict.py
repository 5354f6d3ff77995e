"""What every request model is made of: no conversions, no unknown fields, fields that are known but not served.

A null is the same as leaving the field out.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, JsonValue, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from .errors import ApiError

INT32 = 2**31 - 1
UINT64 = 2**64 - 1

ModelName = Annotated[str, Field(min_length=1, max_length=1000, json_schema_extra={"format": "model"})]
TokenId = Annotated[int, Field(ge=0, le=INT32, json_schema_extra={"format": "token-id"})]
TOKENS: dict[str, JsonValue] = {"format": "tokens"}
"""These formats tell the API's description what a bound is for: the served model has narrower ones."""


class Anything(tuple[object, ...]):
    """The neutral values of a field that never changes the answer: all of them."""

    def __contains__(self, value: object) -> bool:
        return True


ANYTHING = Anything()


class Strict(BaseModel):
    """No conversions, no NaN, no unknown fields; nulls and neutral fields are dropped first."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, Sequence[object]]] = {}
    """Fields that are known but not served → the values that change nothing."""
    reasons: ClassVar[Mapping[str, str]] = {}
    """What to say beside their refusal."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | cls.neutral.keys()
        kept = {}
        for name, value in data.items():
            if name in known and value is None:
                continue
            if name not in cls.neutral:
                kept[name] = value
            elif not _is_neutral(value, cls.neutral[name]):
                reason = cls.reasons.get(name)
                message = f"{name} is not served by this server{f' ({reason})' if reason else ''}: leave it out"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With the known fields that change nothing, and nulls wherever a field may be left out."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        needed = schema.get("required", ())
        fields = schema.setdefault("properties", {})
        for name, field in fields.items():
            if name not in needed:
                fields[name] = _nullable(field)
        for name, values in cls.neutral.items():
            fields[name] = {} if isinstance(values, Anything) else {"enum": [*values, None]}
        return reference


def _nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    options = schema.get("anyOf", [schema])
    known = options == [{}] or {"type": "null"} in options
    return schema if known else {"anyOf": [*options, {"type": "null"}]}


def _is_neutral(value: object, neutral: Sequence[object]) -> bool:
    return isinstance(neutral, Anything) or any(
        value == wanted and isinstance(value, bool) == isinstance(wanted, bool) for wanted in neutral
    )


def bad(message: str) -> PydanticCustomError:
    return PydanticCustomError("bad_value", "{rule}", {"rule": message})
