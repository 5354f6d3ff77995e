"""One strict way from the bytes of a body to a validated request.

Python's JSON accepts NaN, duplicate keys (the last one wins) and lone surrogates, each a way to make two readers of one
body disagree; here they are errors.
"""

import json
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from .errors import ApiError
from .lenient import IGNORED, leave_out_unknown

M = TypeVar("M", bound=BaseModel)


async def read(request: Request, model: type[M]) -> M:
    """The request's body as `model`.

    Raises:
        ApiError: whatever `read_body`, `parse_json` and `understand` raise.
    """
    return understand(request, model, parse_json(await read_body(request)))


async def read_body(request: Request) -> bytes:
    """The body.

    Raises:
        ApiError: 415 for anything but plain JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type ({kind or 'none'}) must be application/json", code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        raise ApiError(415, f"Content-Encoding ({coding}) is not served: send it plain", code="unsupported_media_type")
    return await request.body()


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        ApiError: 400 for invalid UTF-8 or JSON, NaN or Infinity, a number that overflows, a duplicate key, a lone
            surrogate, nesting or digits beyond Python's limits, or anything but an object.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
        if b"\\u" in body:  # only an escape can smuggle a lone surrogate past the decoder
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ApiError(400, f"the body is not valid Unicode: {error.reason}", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def understand(request: Request, model: type[M], data: dict[str, Any]) -> M:
    """`data` as `model`, without what nobody knows where the server is lenient.

    Raises:
        ApiError: whatever `validate` raises.
    """
    if (ignored := request.scope.get(IGNORED)) is not None:
        ignored += leave_out_unknown(model, data)
    return validate(model, data)


def validate(model: type[M], data: dict[str, Any]) -> M:
    """`data` as `model`.

    Raises:
        ApiError: 400 naming the first field at fault, its value and the rule.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = _path(first["loc"])
        if first["type"] == "missing":
            message, code = f"{param} is missing: it is required", "missing_parameter"
        elif first["type"] == "extra_forbidden":
            message, code = f"{param} is not a parameter of this endpoint: leave it out", "unknown_parameter"
        else:
            message, code = f"{param} ({_short(first['input'])}): {first['msg']}", "invalid_value"
        raise ApiError(400, message, param=param, code=code) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:40]!r} is given twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _path(parts: Sequence[str | int]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."
