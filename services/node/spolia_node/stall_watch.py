"""A limit on each of many waits."""

from __future__ import annotations

import asyncio
from types import TracebackType


class StallWatch:
    """Ends a wait inside its `with` blocks that lasts longer than a limit, with `TimeoutError`. One task's.

        with watch:
            await send(token)

    One timer looks after all waits of a stream, when the oldest that could be late would be: `asyncio.timeout` makes
    and cancels one for each. `close` it at the end.
    """

    def __init__(self, limit_s: float) -> None:
        """Made in the task that waits."""
        task = asyncio.current_task()
        assert task is not None, "waits are a task's"
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._began_s: float | None = None
        self._num_cancels = 0
        self._is_late = False
        self._timer = self._loop.call_later(limit_s, self._look)

    def close(self) -> None:
        """Ends the timer."""
        self._timer.cancel()

    def __enter__(self) -> None:
        self._began_s = self._loop.time()
        self._num_cancels = self._task.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._began_s = None
        if self._is_late:
            self._is_late = False
            # Somebody else's cancel that came too goes first.
            if self._task.uncancel() <= self._num_cancels and isinstance(error, asyncio.CancelledError):
                raise TimeoutError(f"nothing came of it in {self._limit_s:g} s") from error

    def _look(self) -> None:
        waited_s = 0.0 if self._began_s is None else self._loop.time() - self._began_s
        if self._began_s is not None and waited_s >= self._limit_s:
            if not self._is_late:  # else it was cancelled, and takes its time to end
                self._is_late = True
                self._task.cancel()
            waited_s = 0.0
        self._timer = self._loop.call_later(self._limit_s - waited_s, self._look)
