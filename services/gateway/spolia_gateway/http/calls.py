"""Work done for HTTP clients: ended when its client goes away, and when the node does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from spolia_core.errors import Cancelled, SpoliaError

T = TypeVar("T")


class Calls:
    """What is under way. A call that ends early ends its work first, and whatever that held is given back by then."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._error: SpoliaError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Calls under way."""
        return len(self._running)

    async def run(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, whose request must have been read whole from `receive`.

        Raises `Cancelled` when the client disconnects first, what `end` was given when that comes first.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(receive))
        self._enter(task)
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Cancelled("the client went away")
            if task.cancelled() and self._error is not None:
                raise self._error
            return task.result()
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.gather(gone, task, return_exceptions=True)
            self._leave(task)

    def end(self, error: SpoliaError) -> int:
        """Ends calls under way, and those that come; their clients get `error`. How many were under way."""
        self._error = error
        for task in self._running:
            task.cancel()
        return len(self._running)

    async def wait_idle(self) -> None:
        """Returns when no call is under way."""
        await self._idle.wait()

    def _enter(self, task: asyncio.Task[Any]) -> None:
        if self._error is not None:
            task.cancel()
        self._running.add(task)
        self._idle.clear()

    def _leave(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not self._running:
            self._idle.set()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
