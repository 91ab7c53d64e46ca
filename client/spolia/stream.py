"""An answer as it grows: deltas to read in a loop, and the whole result after them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Protocol

import grpc

from spolia.answers import Answer
from spolia.lifetime import Lifetime
from spolia.results import Delta, Result
from spolia.v1.gateway_pb2 import GenerateResponse
from spolia_core.errors import Cancelled, SpoliaError


class GenerateCall(Protocol):
    """What a `Stream` needs of a blocking Generate call."""

    def __iter__(self) -> Iterator[GenerateResponse]: ...

    def cancel(self) -> object:
        """Ends the call; does nothing once it has ended."""


class AsyncGenerateCall(Protocol):
    """What an `AsyncStream` needs of an asyncio Generate call."""

    def __aiter__(self) -> AsyncIterator[GenerateResponse]: ...

    def cancel(self) -> bool:
        """Ends the call; False once it has ended."""


class Stream:
    """An answer under way. Read it once; one thread at a time.

    The request is on its way as soon as this exists. Leaving the loop early, leaving a `with` block, or `cancel()` ends
    it and frees what it held in the cluster. Every wait ends with the request's time limit.

    >>> with client.stream("Once upon a time") as stream:
    ...     for delta in stream:
    ...         print(delta.text, end="", flush=True)
    >>> stream.result().finish_reason
    <FinishReason.EOS: 1>
    """

    def __init__(self, call: GenerateCall, answer: Answer, lifetime: Lifetime) -> None:
        self._call = call
        self._lifetime = lifetime
        self._answer = answer
        self._failure: SpoliaError | None = None

    def __iter__(self) -> Iterator[Delta]:
        try:
            while (delta := self._next()) is not None:
                yield delta
        finally:
            self.cancel()

    def result(self) -> Result:
        """Reads what is left and returns the whole answer.

        Raises what the stream failed with: `Cancelled` after `cancel()`, `DeadlineExceeded`, `Unavailable`, ….
        """
        while self._next() is not None:
            pass
        return self._answer.result()

    def cancel(self) -> None:
        """Ends the request now. Does nothing once the answer is whole."""
        self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _next(self) -> Delta | None:
        if self._failure is not None:
            raise self._failure
        try:
            for response in self._call:
                delta = self._answer.add(response, time.monotonic())
                if delta is not None:
                    return delta
        except grpc.RpcError as error:
            if not self._answer.finished:
                self._failure = self._lifetime.error_of(error)
                raise self._failure from error
        except SpoliaError as error:
            self._failure = error
            self.cancel()
            raise
        return None


class AsyncStream:
    """An answer under way, for asyncio. Read it once, from one task at a time.

    The request is on its way as soon as this exists. Leaving an `async with` block or `cancel()` ends it and frees what
    it held in the cluster; leaving the loop early does so too, as soon as the event loop runs again.

    >>> async with client.stream("Once upon a time") as stream:
    ...     async for delta in stream:
    ...         print(delta.text, end="", flush=True)
    >>> (await stream.result()).finish_reason
    <FinishReason.EOS: 1>
    """

    def __init__(self, call: AsyncGenerateCall, answer: Answer, lifetime: Lifetime) -> None:
        self._call = call
        self._lifetime = lifetime
        self._answer = answer
        self._failure: SpoliaError | None = None
        self._cancelled_here = False

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while (delta := await self._next()) is not None:
                yield delta
        finally:
            self.cancel()

    async def result(self) -> Result:
        """Reads what is left and returns the whole answer.

        Raises what the stream failed with: `Cancelled` after `cancel()`, `DeadlineExceeded`, `Unavailable`, ….
        """
        while await self._next() is not None:
            pass
        return self._answer.result()

    def cancel(self) -> None:
        """Ends the request now. Does nothing once the answer is whole."""
        self._cancelled_here = self._call.cancel() or self._cancelled_here

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def _next(self) -> Delta | None:
        if self._failure is not None:
            raise self._failure
        try:
            async for response in self._call:
                delta = self._answer.add(response, time.monotonic())
                if delta is not None:
                    return delta
        except grpc.RpcError as error:
            if not self._answer.finished:
                self._failure = self._lifetime.error_of(error)
                raise self._failure from error
        except asyncio.CancelledError:
            # gRPC says so both when this task is cancelled and when only the call was.
            closed = self._lifetime.closed_under_this_task()
            self._failure = closed or Cancelled("the stream was cancelled")
            if closed is None and not self._cancelled_here:
                raise
            raise self._failure from None
        except SpoliaError as error:
            self._failure = error
            self.cancel()
            raise
        return None
