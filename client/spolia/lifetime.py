"""Whether a client is open, and what its calls raise on the way out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from spolia.errors import error_from_rpc
from spolia_core.errors import Cancelled, InvalidRequest, SpoliaError

# What gRPC says of a call whose channel is closed under it, by what the call meets first.
_CODES_OF_CLOSING = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)


class Lifetime:
    """Shared by a client and the answers it started. Open until `close`."""

    def __init__(self) -> None:
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """From here on no call begins, and those under way end as `Cancelled`."""
        self._closed = True

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around the start of a call, or all of it where that is one await: raises classes of `spolia.errors` only."""
        self._check_open()
        try:
            with self.errors():
                yield
        except (ValueError, grpc.aio.UsageError):  # gRPC's words for a closed channel
            self._check_open()  # another thread may have closed it since
            raise

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Around a wait for an answer: turns gRPC's ways to fail into the errors they stand for.

        Only a cancel of the task that waits stays a `CancelledError`.
        """
        try:
            yield
        except grpc.RpcError as error:
            raise self.error_of(error) from error
        except asyncio.InvalidStateError as error:
            if not self._closed:
                raise
            raise _closed_under_it() from error
        except asyncio.CancelledError:
            closed = self.closed_under_this_task()
            if closed is None:
                raise
            raise closed from None

    def check_still_open(self) -> None:
        """Within a call: raises `Cancelled` once the client was closed."""
        if self._closed:
            raise _closed_under_it()

    def error_of(self, error: grpc.RpcError) -> SpoliaError:
        """The error that a failed call of this client stands for."""
        closing = self._closed and getattr(error, "code", lambda: None)() in _CODES_OF_CLOSING
        return _closed_under_it() if closing else error_from_rpc(error)

    def closed_under_this_task(self) -> Cancelled | None:
        """What a `CancelledError` met now stands for, when closing is its reason; None when the task is cancelled."""
        if not self._closed:
            return None
        task = asyncio.current_task()
        return None if task is not None and task.cancelling() else _closed_under_it()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest("the client is closed", limit="an open client", actual="closed")


def _closed_under_it() -> Cancelled:
    return Cancelled("the client was closed during the call")
