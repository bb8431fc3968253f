"""Errors in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, for everything that a server answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from chatglm_ptuning.serving.api.schema import ROLE_NAMES
from chatglm_ptuning.serving.engine.request import EngineError, PromptTooLong, QueueFull, UnknownPrefix

logger = logging.getLogger(__name__)

_SHOWN_FAULTS = 3
_TYPES = ("str", "int", "constrained-str", "constrained-int")


def to_json(value: Any) -> str:
    """JSON on one line; a surrogate, which UTF-8 cannot have, becomes `?`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")


class Json(Response):
    """A response of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return to_json(content).encode()


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetails


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: the HTTP status.
        code: a word for programs.
        param: the field of the request that is at fault.
        headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The response to send."""
        return Json(self.body, self.status, self.headers)


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def of_engine(error: Exception) -> ApiError:
    """What a client is told about an error of the engine."""
    if isinstance(error, UnknownPrefix):
        return ApiError(404, f"{error} GET /v1/models lists the models.", "model_not_found", "model")
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "queue_full", headers={"Retry-After": str(error.retry_after)})
    return ApiError(500, "The engine failed while it answered this request. Send it again.", "engine_error")


ENGINE_ERRORS = (EngineError, PromptTooLong, QueueFull, UnknownPrefix)


def of_validation(error: RequestValidationError) -> ApiError:
    """Names the fields that do not fit; never repeats their values."""
    faults = error.errors()
    if faults[0]["type"] == "json_invalid":
        reason = faults[0].get("ctx", {}).get("error", "malformed")
        return ApiError(400, f"The body is not JSON: {reason}, at character {faults[0]['loc'][-1]}.", "invalid_json")
    if len(faults[0]["loc"]) < 2:
        message = "The body must be a JSON object, sent with Content-Type: application/json."
        return ApiError(400, message if faults[0]["type"] != "value_error" else _reason(faults[0]), "invalid_value")
    shown = [f"{_place(fault['loc'])}: {_reason(fault)}" for fault in faults[:_SHOWN_FAULTS]]
    more = f" (and {len(faults) - _SHOWN_FAULTS} more)" if len(faults) > _SHOWN_FAULTS else ""
    code = "unknown_parameter" if faults[0]["type"] == "extra_forbidden" else "invalid_value"
    return ApiError(400, "; ".join(shown) + more, code, _place(faults[0]["loc"]))


def _place(location: tuple[Any, ...]) -> str | None:
    """A field as JSON names it, such as `messages[0].content`; pydantic also names the members of unions."""
    text, before = "", None
    for part in location[1:]:
        is_member = part in ROLE_NAMES if isinstance(before, int) else part in _TYPES or "[" in str(part)
        before = part
        if is_member:
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:200] or None


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "there is no such parameter"
    return str(fault["msg"]).removeprefix("Value error, ")


def add_handlers(app: FastAPI) -> None:
    """Makes an app answer every error in OpenAI's form."""

    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    async def validation_error(_: Request, error: RequestValidationError) -> Response:
        return of_validation(error).response()

    async def http_error(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"There is no {request.method} {request.url.path[:200]}.",
            405: f"{request.url.path[:200]} does not take {request.method}.",
        }
        message = messages.get(error.status_code) or str(error.detail or HTTPStatus(error.status_code).phrase)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, message, code, headers=error.headers).response()

    async def other_error(_: Request, error: Exception) -> Response:
        return ApiError(500, "The server failed; its log says why.", "internal_error").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, other_error)
