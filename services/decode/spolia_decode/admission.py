"""Places for requests: so many run, so many wait, the rest are told to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from spolia_core.errors import Busy
from spolia_node.deadline import Deadline


class Admission:
    """First come, first served, within each request's deadline."""

    def __init__(self, max_running: int, max_waiting: int, on_idle: Callable[[], None] = lambda: None) -> None:
        """`on_idle` is called when the last request that was here has gone."""
        self._places = asyncio.Semaphore(max_running)
        self._max_waiting = max_waiting
        self._on_idle = on_idle
        self._num_present = 0
        self.num_running = 0
        self.num_waiting = 0
        self.queued_tokens = 0
        """Tokens of requests that wait for a place or are being prepared: what stands before one more request."""

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits. May be read from any thread."""
        return self._num_present == 0

    @asynccontextmanager
    async def place(self, deadline: Deadline, num_tokens: int = 0) -> AsyncIterator[Callable[[], None]]:
        """Holds a place. Raises `Busy` when too many wait, `DeadlineExceeded` when none came free in time.

        `num_tokens` count as queued until the function it yields is called, which says that the request decodes.
        """
        if self._places.locked() and self.num_waiting >= self._max_waiting:
            raise Busy(
                f"{self.num_running} requests run and {self.num_waiting} wait",
                field="max_waiting",
                limit=str(self._max_waiting),
                actual=str(self.num_waiting),
                retry_after_ms=1000,
            )
        with self._present(), self._queued(num_tokens) as decodes:
            self.num_waiting += 1
            try:
                await deadline.wait(self._places.acquire(), "waiting for a place")
            finally:
                self.num_waiting -= 1
            self.num_running += 1
            try:
                yield decodes
            finally:
                self.num_running -= 1
                self._places.release()

    @contextmanager
    def _queued(self, num_tokens: int) -> Iterator[Callable[[], None]]:
        left = num_tokens
        self.queued_tokens += left

        def decodes() -> None:
            nonlocal left
            self.queued_tokens -= left
            left = 0

        try:
            yield decodes
        finally:
            decodes()

    @contextmanager
    def _present(self) -> Iterator[None]:
        self._num_present += 1
        try:
            yield
        finally:
            self._num_present -= 1
            if self.is_idle:
                self._on_idle()
