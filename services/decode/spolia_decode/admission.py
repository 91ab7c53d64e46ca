"""Places for requests: so many run, so many wait, the rest are told to come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from spolia_core.errors import Busy
from spolia_node.deadline import Deadline


class Admission:
    """First come, first served, within each request's deadline."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._places = asyncio.Semaphore(max_running)
        self._max_waiting = max_waiting
        self.num_running = 0
        self.num_waiting = 0

    @asynccontextmanager
    async def place(self, deadline: Deadline) -> AsyncIterator[None]:
        """Holds a place. Raises `Busy` when too many wait, `DeadlineExceeded` when none came free in time."""
        if self._places.locked() and self.num_waiting >= self._max_waiting:
            raise Busy(
                f"{self.num_running} requests run and {self.num_waiting} wait",
                field="max_waiting",
                limit=str(self._max_waiting),
                actual=str(self.num_waiting),
                retry_after_ms=1000,
            )
        self.num_waiting += 1
        try:
            await deadline.wait(self._places.acquire(), "waiting for a place")
        finally:
            self.num_waiting -= 1
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self._places.release()
