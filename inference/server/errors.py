"""One table from what went wrong to what the client is told: `{"error": {"message", "type", "param", "code"}}`.

A message names the field, the value and the rule, never a path or a traceback, and is cut so that the body stays small.
"""

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ... import RequestError, TurnoutError
from ..core.request import QueueFullError
from ..errors import EngineStoppedError, QueueTimeoutError

LONGEST = {"message": 500, "param": 100}  # characters; at 6 bytes for an escaped one the body stays below 4 KiB
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed"}

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

logger = logging.getLogger(__name__)


class ApiError(TurnoutError):
    """An answer other than 200.

    Args:
        status: the HTTP status.
        message: what is wrong and what to do about it.
        param: the request's field, when a single one is at fault.
        code: a word for programs (`model_not_found`).
        headers: further headers of the answer (`Retry-After`).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": {name: value and value[: LONGEST.get(name)] for name, value in fields.items()}}

    def response(self) -> Response:
        """The whole answer."""
        return Response(to_json(self.body()), self.status, headers=self.headers, media_type="application/json")


def to_json(value: object) -> bytes:
    """`value` as JSON in UTF-8.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON can not carry.
    """
    return _ENCODER.encode(value).encode()


def api_error(error: BaseException) -> ApiError:
    """The one table. What is not in it is a defect of ours: 500, and the client learns nothing more."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, QueueTimeoutError):
        return ApiError(503, str(error), code="queue_timeout", headers={"Retry-After": "5"})
    if isinstance(error, EngineStoppedError):  # its message has the root cause, which is not for clients
        return ApiError(
            503, "the engine has stopped: try again later", code="unavailable", headers={"Retry-After": "5"}
        )
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code="invalid_value")
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, phrase, code=CODES.get(error.status_code), headers=error.headers)
    return ApiError(500, "internal error: the server's log has the cause", code="internal_error")


def json_response(value: object, status: int = 200) -> Response:
    """`value` as an answer."""
    return Response(to_json(value), status, media_type="application/json")


async def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler."""
    answer = api_error(error)
    if answer.status == 500:
        logger.error("a request failed: %s", error, exc_info=None if isinstance(error, TurnoutError) else error)
    return answer.response()
