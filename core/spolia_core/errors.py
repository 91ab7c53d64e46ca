"""One error tree; each class is named for what the caller can do.

SpoliaError
├── InvalidRequest       fix the request: names the field, the limit and what was given
│   └── ContextTooLong   shorten it: prompt and answer exceed the model's context; over gRPC an InvalidRequest
├── Unauthenticated      show who you are: a key, or a certificate of the cluster's authority
├── Forbidden            ask someone who may: this identity is known and may not do that
├── NotFound             ask for something that exists
├── NotSupported         use another model or mode: names the layer or property
├── Busy                 retry here later: carries a hint
├── Unavailable          retry elsewhere, or here once the node is back
├── DeadlineExceeded     give more time, or give up
├── Cancelled            nobody waits for the answer any more
├── DataCorrupt          bytes did not match their digest: fetch elsewhere or recompute
├── AlreadyStored        nothing to do: another replica of the chunk was first
└── InternalError        give up and report: an invariant of ours broke
"""

from __future__ import annotations


class SpoliaError(Exception):
    """Base of all errors a caller of Spolia meets.

    `field`, `limit` and `actual` say what was wrong where one field is to blame; `retry_after_ms` is 0 where waiting
    does not help. `retryable` says whether the same request may succeed elsewhere or later.
    """

    retryable = False

    def __init__(
        self, message: str, *, field: str = "", limit: str = "", actual: str = "", retry_after_ms: int = 0
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.limit = limit
        self.actual = actual
        self.retry_after_ms = retry_after_ms


class InvalidRequest(SpoliaError):
    """A field of the request is wrong; the same request will never succeed."""


class ContextTooLong(InvalidRequest):
    """Prompt and answer together exceed the model's context."""


class Unauthenticated(SpoliaError):
    """Nobody known asks: no key or certificate, or one that is unknown, withdrawn or expired."""


class Forbidden(SpoliaError):
    """Who asks is known and may not do this."""


class NotFound(SpoliaError):
    """What was asked for does not exist here."""


class NotSupported(SpoliaError):
    """The model or node cannot do this; the message names the layer or property that stands in the way."""


class Busy(SpoliaError):
    """No room now. Retry after `retry_after_ms`."""

    retryable = True


class Unavailable(SpoliaError):
    """The node cannot be reached, is draining or died. Retry elsewhere."""

    retryable = True


class DeadlineExceeded(SpoliaError):
    """The caller's time ran out."""


class Cancelled(SpoliaError):
    """The caller went away."""


class DataCorrupt(SpoliaError):
    """Bytes did not match their digest. They were dropped; fetch another replica or recompute."""

    retryable = True


class AlreadyStored(SpoliaError):
    """Another replica of the chunk was stored first; use that one."""


class InternalError(SpoliaError):
    """An invariant broke. Nothing the caller can do."""


ERROR_KINDS: dict[str, type[SpoliaError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        Unauthenticated,
        Forbidden,
        NotFound,
        NotSupported,
        Busy,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        DataCorrupt,
        AlreadyStored,
        InternalError,
    )
}
"""Class name to class: what `ErrorDetail.kind` may say."""
