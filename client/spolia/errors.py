"""The error tree, and how it crosses gRPC.

A server sends a status code, a message, and an `ErrorDetail` in the trailing metadata; a client gets back the class
and the fields that were raised. Where no detail came (gRPC itself failed the call, or a proxy did), the status code
alone decides.
"""

from __future__ import annotations

from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from spolia.v1.common_pb2 import ErrorDetail
from spolia_core.errors import (
    ERROR_KINDS,
    AlreadyStored,
    Busy,
    Cancelled,
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

__all__ = [
    "DETAIL_KEY",
    "ERROR_KINDS",
    "STATUS_OF",
    "AlreadyStored",
    "Busy",
    "Cancelled",
    "DataCorrupt",
    "DeadlineExceeded",
    "Forbidden",
    "InternalError",
    "InvalidRequest",
    "NotFound",
    "NotSupported",
    "SpoliaError",
    "Unauthenticated",
    "Unavailable",
    "detail_of",
    "error_from_rpc",
    "error_of",
    "is_of_a_node",
    "status_of",
]

DETAIL_KEY = "spolia-error-bin"
"""Trailing metadata key of the serialized `ErrorDetail`."""

STATUS_OF: dict[type[SpoliaError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    NotSupported: grpc.StatusCode.FAILED_PRECONDITION,
    Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    DataCorrupt: grpc.StatusCode.DATA_LOSS,
    AlreadyStored: grpc.StatusCode.ALREADY_EXISTS,
    InternalError: grpc.StatusCode.INTERNAL,
}
"""Which status code each class of error travels as."""

_CLASS_OF: dict[grpc.StatusCode, type[SpoliaError]] = {
    **{code: cls for cls, code in STATUS_OF.items()},
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
}

# What gRPC says of a call that this process itself gave up.
_CANCELLED_HERE = ("Locally cancelled by application!", "Channel closed!", "Stream removed (Channel closed!)")

_BROKEN_STREAM = "Internal error from Core"

# Trailers share one metadata limit (8 KiB by default) and a call whose trailers exceed it loses its status.
_MAX_FIELD_CHARS = 256


def status_of(error: SpoliaError) -> grpc.StatusCode:
    """The code `error` travels as: that of its nearest listed class, INTERNAL when it has none."""
    return STATUS_OF.get(_listed_class(error), grpc.StatusCode.INTERNAL)


def detail_of(error: SpoliaError) -> ErrorDetail:
    """What a program can act on. Long field texts are cut to 256 characters."""
    return ErrorDetail(
        kind=_listed_class(error).__name__,
        field=_clipped(error.field),
        limit=_clipped(error.limit),
        actual=_clipped(error.actual),
        retry_after_ms=max(0, min(error.retry_after_ms, 2**32 - 1)),
    )


def error_from_rpc(error: grpc.RpcError) -> SpoliaError:
    """The error a failed call stands for, from a blocking or an asyncio call. Never raises."""
    # Both kinds of failed call have these methods; the base class does not declare them.
    call = cast(Any, error)
    code: grpc.StatusCode = call.code()
    return error_of(code, call.details() or code.name, _detail_in(call.trailing_metadata()))


def error_of(code: grpc.StatusCode, message: str, detail: ErrorDetail | None) -> SpoliaError:
    """The error that a status stands for, with what its server said beside it; None where it said nothing."""
    if detail is None:
        return _class_without_detail(code, message)(message)
    return ERROR_KINDS.get(detail.kind, _CLASS_OF.get(code, InternalError))(
        message,
        field=detail.field,
        limit=detail.limit,
        actual=detail.actual,
        retry_after_ms=detail.retry_after_ms,
    )


def is_of_a_node(error: grpc.RpcError) -> bool:
    """Whether a node said why the call failed; else gRPC did, or what stands in between."""
    return _detail_in(cast(Any, error).trailing_metadata()) is not None


def _class_without_detail(code: grpc.StatusCode, message: str) -> type[SpoliaError]:
    # A server that stops cancels the calls it has not looked at yet. Nobody gave those up; another node may take them.
    if code is grpc.StatusCode.CANCELLED and message not in _CANCELLED_HERE:
        return Unavailable
    # A batch of operations on a stream whose peer died in the middle of them; grpc.aio says no more than this.
    if code is grpc.StatusCode.INTERNAL and message == _BROKEN_STREAM:
        return Unavailable
    # gRPC refuses an oversize message with the code that means "busy" here; sending it again would never succeed.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return InvalidRequest
    return _CLASS_OF.get(code, InternalError)


def _listed_class(error: SpoliaError) -> type[SpoliaError]:
    return next((cls for cls in type(error).__mro__ if cls in STATUS_OF), InternalError)


def _detail_in(metadata: Any) -> ErrorDetail | None:
    for key, value in metadata or ():
        if key == DETAIL_KEY:
            try:
                return ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None


def _clipped(text: str) -> str:
    # Protobuf refuses lone surrogates, which a message quoting a caller's bytes may hold.
    clean = text.encode("utf-8", "replace").decode()
    return clean if len(clean) <= _MAX_FIELD_CHARS else clean[: _MAX_FIELD_CHARS - 1] + "…"
