"""Errors as OpenAI's clients know them: a status, a body with `error`, and when to come back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from spolia_core.errors import (
    AlreadyStored,
    Busy,
    Cancelled,
    ContextTooLong,
    DataCorrupt,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    SpoliaError,
    Unauthenticated,
    Unavailable,
)

DEFAULT_RETRY_MS = 1000
"""When to come back where the error does not say, and coming back may help."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """How a class of errors is told over HTTP."""

    status: int
    type: str
    code: str | None = None
    comes_back: bool = False
    """Whether Retry-After is told."""


REQUEST = "invalid_request_error"
_SERVER = "server_error"

HTTP_ERRORS: dict[type[SpoliaError], HttpError] = {
    InvalidRequest: HttpError(400, REQUEST),
    ContextTooLong: HttpError(400, REQUEST, "context_length_exceeded"),
    NotSupported: HttpError(400, REQUEST, "not_supported"),
    Unauthenticated: HttpError(401, REQUEST, "invalid_api_key"),
    Forbidden: HttpError(403, REQUEST, "forbidden"),
    NotFound: HttpError(404, REQUEST, "not_found"),
    AlreadyStored: HttpError(409, REQUEST, "already_stored"),
    Busy: HttpError(429, "rate_limit_error", "busy", comes_back=True),
    Cancelled: HttpError(499, REQUEST, "cancelled"),
    DataCorrupt: HttpError(500, _SERVER, "data_corrupt"),
    InternalError: HttpError(500, _SERVER, "internal_error"),
    Unavailable: HttpError(503, _SERVER, "unavailable", comes_back=True),
    DeadlineExceeded: HttpError(504, _SERVER, "deadline_exceeded"),
}
"""The nearest class of an error decides."""

_PARAMS = {
    "sampling.num_samples": "n",
    "sampling.num_top_logprobs": "top_logprobs",
    "sampling.json_schema": "response_format.json_schema.schema",
    "sampling.json_object": "response_format",
    "sampling.lark": "tools",
    "mode": "reuse",
    "profile": "reuse",
    "request_id": "x-request-id",
}
"""What fields of the gateway's messages are called over HTTP, where that is not their last word."""

_INNER = re.compile(r"sampling\.|parts\b|request_id$")
"""Fields whose names no client over HTTP has seen: messages say them too."""


def http_error_of(error: SpoliaError) -> HttpError:
    """How `error` is told; as an internal one where its class is not listed."""
    return next((HTTP_ERRORS[cls] for cls in type(error).__mro__ if cls in HTTP_ERRORS), HTTP_ERRORS[InternalError])


def error_body(error: SpoliaError, prompt_field: str = "prompt") -> dict[str, Any]:
    """The body for `error`; `prompt_field` is what holds the prompt in the request that met it."""
    told = http_error_of(error)
    code = "model_not_found" if isinstance(error, NotFound) and error.field == "model" else told.code
    # No field of a request is to blame for how busy a node or a tenant is; the error names a limit of theirs.
    param = None if isinstance(error, Busy) else _param(error.field, prompt_field)
    return body_of(_in_words_of_http(error, param), told.type, param, code)


def body_of(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """A body in OpenAI's form."""
    clean = message.encode("utf-8", "replace").decode()  # a message may quote what no UTF-8 can hold
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def error_response(error: SpoliaError, prompt_field: str = "prompt") -> JSONResponse:
    """The whole answer for `error`."""
    told = http_error_of(error)
    return JSONResponse(error_body(error, prompt_field), told.status, _headers(error, told))


def plain_error(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer for what goes wrong in HTTP itself."""
    return JSONResponse(body_of(message, REQUEST if status < 500 else _SERVER, None, code), status, headers)


def _headers(error: SpoliaError, told: HttpError) -> dict[str, str]:
    """When to come back, or what to show."""
    if told.status == 401:
        return {"www-authenticate": "Bearer"}
    if not told.comes_back:
        return {}
    wait_ms = error.retry_after_ms or DEFAULT_RETRY_MS
    return {"retry-after": str(math.ceil(wait_ms / 1000)), "retry-after-ms": str(wait_ms)}


def _param(field: str, prompt_field: str) -> str | None:
    if not field:
        return None
    if re.match(r"parts\b", field):
        return "documents" if ".document" in field else prompt_field
    return _PARAMS.get(field, field.removeprefix("sampling."))


def _in_words_of_http(error: SpoliaError, param: str | None) -> str:
    """The message, its field called `param` in it."""
    if param is None or not _INNER.match(error.field):
        return error.message
    return re.sub(rf"(?<![\w.]){re.escape(error.field)}(?!\w)", lambda _: param, error.message)
