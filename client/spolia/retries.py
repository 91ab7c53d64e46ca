"""Calls that are made again while nothing has come of them: what a client waits out while a node is being replaced.

Only `Unavailable` is waited out, and only before the first message of an answer, so nothing is ever said twice. Every
try is the same request under the same id. A port that speaks another protocol than the client is told from an outage:
the first time that nobody answers it is asked what it speaks.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import grpc

from spolia.connection import Door
from spolia.errors import error_from_rpc
from spolia.lifetime import Lifetime
from spolia.spoken import gateway_speaks_otherwise, may_speak_otherwise
from spolia_core.errors import Cancelled, InvalidRequest, Unavailable

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
"""Times up to `SPREAD`, by chance, so that those who were turned away together do not come back together."""

SPREAD = 1.5

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Patience:
    """How long one call is tried again."""

    def __init__(self, until_s: float, lifetime: Lifetime, door: Door, deadline_s: float) -> None:
        """`until_s` and the call's `deadline_s` on the monotonic clock. A client that is closed tries nothing again."""
        self._until_s = until_s
        self._lifetime = lifetime
        self._door = door
        self._deadline_s = deadline_s
        self._knows_what_is_spoken = False
        self._pause_s = FIRST_PAUSE_S

    def pause_s(self, error: grpc.RpcError) -> float | None:
        """How long to wait before the call that failed with `error` is made again; None: it is not.

        Raises `InvalidRequest` where it failed because another protocol is spoken at the door; asks there once.
        """
        if self._is_to_ask_what_is_spoken(error):
            self._check_what_is_spoken()
        return self._next_pause_s(error)

    async def apause_s(self, error: grpc.RpcError) -> float | None:
        """The same for asyncio."""
        if self._is_to_ask_what_is_spoken(error):
            await asyncio.to_thread(self._check_what_is_spoken)
        return self._next_pause_s(error)

    def _is_to_ask_what_is_spoken(self, error: grpc.RpcError) -> bool:
        return not self._knows_what_is_spoken and not self._lifetime.closed and may_speak_otherwise(error)

    def _check_what_is_spoken(self) -> None:
        self._knows_what_is_spoken = True
        left_s = self._deadline_s - time.monotonic()
        if left_s > 0:
            door = self._door
            other = gateway_speaks_otherwise(door.address, plaintext=door.plaintext, timeout_s=left_s)
            if other is not None:
                raise other

    def _next_pause_s(self, error: grpc.RpcError) -> float | None:
        known = error_from_rpc(error)
        if self._lifetime.closed or not isinstance(known, Unavailable):
            return None
        wait_s = max(known.retry_after_ms / 1000, self._pause_s) * random.uniform(1.0, SPREAD)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        return wait_s if time.monotonic() + wait_s < self._until_s else None

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Around a try: raises `Cancelled` where the client was closed since the call began."""
        self._lifetime.check_still_open()
        try:
            yield
        except (InvalidRequest, ValueError, grpc.aio.UsageError):  # how a closed client, and a closed channel, refuse
            self._lifetime.check_still_open()
            raise

    def call(self, begin: Callable[[], T]) -> T:
        """What `begin`, a call with one answer, returns in the end. Raises how the last try failed."""
        while True:
            try:
                with self.trying():
                    return begin()
            except grpc.RpcError as error:
                wait_s = self.pause_s(error)
                if wait_s is None:
                    raise
            time.sleep(wait_s)

    async def acall(self, begin: Callable[[], Awaitable[T]]) -> T:
        """The same for asyncio."""
        while True:
            try:
                with self.trying():
                    return await begin()
            except grpc.RpcError as error:
                wait_s = await self.apause_s(error)
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)


class ServerStream(Protocol[T_co]):
    """What is needed of a blocking call with many answers."""

    def __next__(self) -> T_co: ...

    def cancel(self) -> object:
        """Ends the call; does nothing once it has ended."""


class PatientStream(Generic[T]):
    """A blocking call with many answers, begun at once, and again while none has come. To be iterated once."""

    def __init__(self, begin: Callable[[], ServerStream[T]], patience: Patience) -> None:
        self._begin = begin
        self._patience = patience
        self._call = begin()
        self._has_begun = False
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            try:
                answer = next(self._call)
                self._has_begun = True
                return answer
            except grpc.RpcError as error:
                wait_s = None if self._has_begun else self._patience.pause_s(error)
                if wait_s is None or self._cancelled.is_set():
                    raise
            if self._cancelled.wait(wait_s):
                raise Cancelled("the stream was cancelled")
            with self._patience.trying():
                self._call = self._begin()
            if self._cancelled.is_set():  # while this call began: the one before it was cancelled
                self._call.cancel()

    def cancel(self) -> None:
        """Ends the call, and the wait for the next; does nothing once it has ended."""
        self._cancelled.set()
        self._call.cancel()


class AsyncServerStream(Protocol[T_co]):
    """What is needed of an asyncio call with many answers."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    def cancel(self) -> bool:
        """Ends the call; False once it has ended."""


class AsyncPatientStream(Generic[T]):
    """The same for asyncio."""

    def __init__(self, begin: Callable[[], AsyncServerStream[T]], patience: Patience) -> None:
        self._begin = begin
        self._patience = patience
        self._call = begin()
        self._has_begun = False
        self._pause: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            try:
                answer = await anext(aiter(self._call))
                self._has_begun = True
                return answer
            except grpc.RpcError as error:
                wait_s = None if self._has_begun else await self._patience.apause_s(error)
                if wait_s is None:
                    raise
            self._pause = asyncio.ensure_future(asyncio.sleep(wait_s))
            try:
                await self._pause  # a `cancel` ends it as it would end a call
            finally:
                self._pause = None
            with self._patience.trying():
                self._call = self._begin()

    def cancel(self) -> bool:
        """Ends the call, or the wait for the next; False once it has ended."""
        return self._pause.cancel() if self._pause is not None else self._call.cancel()
