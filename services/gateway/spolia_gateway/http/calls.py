"""Work done for HTTP clients: ended when its client goes away, and when the node does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive

from spolia_core.errors import Cancelled, SpoliaError

T = TypeVar("T")


class Calls:
    """What is under way. A call that ends early ends its work first, and whatever that held is given back by then."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._cut: dict[asyncio.Task[Any], SpoliaError] = {}
        """Those that were ended early, and are on their way out, with what they are told."""
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
        task, gone = asyncio.current_task(), asyncio.ensure_future(_disconnected(receive))
        assert task is not None, "calls are made in tasks"
        left = partial(self._left, task)
        gone.add_done_callback(left)
        with self._entered(task):
            try:
                if self._error is not None:
                    work.close()
                    raise self._error
                return await work
            finally:
                gone.remove_done_callback(left)
                gone.cancel()

    def end(self, error: SpoliaError) -> int:
        """Ends calls under way, and those that come; their clients get `error`. How many were under way."""
        self._error = error
        for task in self._running:
            self._end_early(task, error)
        return len(self._running)

    async def wait_idle(self) -> None:
        """Returns when no call is under way."""
        await self._idle.wait()

    def _left(self, task: asyncio.Task[Any], _gone: asyncio.Task[None]) -> None:
        self._end_early(task, Cancelled("the client went away"))

    def _end_early(self, task: asyncio.Task[Any], error: SpoliaError) -> None:
        """Cancels a call, which then raises `error`; nothing once it is over, or on its way out."""
        if task in self._running and task not in self._cut:
            self._cut[task] = error
            task.cancel()

    @contextmanager
    def _entered(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """Around a call, which may be ended early as long as it runs."""
        num_cancels = task.cancelling()
        self._running.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            # Somebody else's cancel that came too goes first.
            if task not in self._cut or task.cancelling() > num_cancels + 1:
                raise
            raise self._cut[task] from None
        finally:
            if self._cut.pop(task, None) is not None:
                task.uncancel()
            self._running.discard(task)
            if not self._running:
                self._idle.set()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
