"""The one thread that owns the device. The event loop hands it work and never waits for it on the loop.

event loop ── run(fn) ──▶ queue ──▶ thread: one task, one background step, one task, …
           ◀── future ──────────────┘
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from spolia_core.errors import InternalError, Unavailable
from spolia_node.logs import get_log

T = TypeVar("T")
log = get_log(__name__)


@dataclass(slots=True, eq=False)
class _Task:
    fn: Callable[[], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    discard: Callable[[Any], None] | None
    skip: Callable[[], None] | None
    abandoned: bool = False

    def drop(self, result: Any, error: BaseException | None) -> None:
        """Nobody takes what came of it."""
        if error is None and self.discard:
            self.discard(result)


class EngineThread:
    """Runs functions one after another, and between them a background step (the decode batch) while it has work.

    `background` runs one step and returns whether there is more to do. It must not raise, nor may `discard` and `skip`
    functions: any of them doing so ends the thread, which `is_stalled` tells.
    """

    def __init__(self, name: str, background: Callable[[], bool] | None = None) -> None:
        self._background = background
        self._tasks: deque[_Task] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._has_background = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Asks the thread to end after what it runs now, and waits so long; queued tasks fail with `Unavailable`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout_s)

    @property
    def queue_length(self) -> int:
        """Tasks that wait."""
        return len(self._tasks)

    def is_stalled(self, limit_s: float) -> bool:
        """Whether the thread is dead, or has been at one task or step for longer than `limit_s`."""
        since = self._busy_since
        return not self._thread.is_alive() or (since is not None and time.monotonic() - since > limit_s)

    def notify(self) -> None:
        """Says that the background step has work. Callable from any thread."""
        with self._wake:
            self._has_background = self._background is not None
            self._wake.notify()

    def submit(
        self, fn: Callable[[], T], *, discard: Callable[[T], None] | None = None, skip: Callable[[], None] | None = None
    ) -> asyncio.Future[T]:
        """Queues `fn` for the thread; the future gets its result, or what it raised.

        When the future is cancelled: a task that has not begun leaves the queue and `skip` is called instead; one under
        way runs to its end and its result goes to `discard`. So what `fn` takes or makes is freed on every path; a
        result that the future did deliver is its owner's. Raises `Unavailable`, after `skip`, when there is no thread.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        task = _Task(fn, future, loop, discard, skip)
        future.add_done_callback(lambda done: self._abandon(task) if done.cancelled() else None)
        with self._wake:
            running = not self._stopping and self._thread.is_alive()
            if running:
                self._tasks.append(task)
                self._wake.notify()
        if not running:
            if skip:
                skip()
            raise Unavailable("the engine is not running")
        return future

    async def run(
        self, fn: Callable[[], T], *, discard: Callable[[T], None] | None = None, skip: Callable[[], None] | None = None
    ) -> T:
        """`submit`, awaited. A result that arrives as the caller is cancelled goes to `discard` too."""
        future = self.submit(fn, discard=discard, skip=skip)
        try:
            return await future
        except asyncio.CancelledError:
            if discard and future.done() and not future.cancelled() and future.exception() is None:
                discard(future.result())
            raise

    def _abandon(self, task: _Task) -> None:
        with self._wake:
            task.abandoned = True
            has_not_begun = task in self._tasks
            if has_not_begun:
                self._tasks.remove(task)
        if has_not_begun and task.skip:
            task.skip()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                task = self._next_task()
                if task is not None:
                    self._busy_since = time.monotonic()
                    _execute(task, self._wake)
                if self._has_background and self._background is not None:
                    self._busy_since = time.monotonic()
                    self._has_background = False  # before the step: a notification during it is not lost
                    if self._background():
                        self._has_background = True
                self._busy_since = None
        finally:  # also when an invariant broke: nobody may wait for a thread that is gone
            self._refuse_all()

    def _wait_for_work(self) -> bool:
        """False when the thread is to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._tasks or self._has_background or self._stopping)
            return not self._stopping

    def _next_task(self) -> _Task | None:
        with self._wake:
            return self._tasks.popleft() if self._tasks else None

    def _refuse_all(self) -> None:
        with self._wake:
            self._stopping = True
            refused = list(self._tasks)
            self._tasks.clear()
        for task in refused:
            if task.skip:
                task.skip()
            _post(task, None, Unavailable("the node is shutting down"))


def _execute(task: _Task, lock: threading.Condition) -> None:
    result: Any = None
    error: BaseException | None = None
    try:
        result = task.fn()
    except StopIteration as caught:  # the one exception a future cannot carry
        error = InternalError(f"the engine raised {caught!r}")
    except BaseException as caught:  # delivered to the caller, whatever it is
        error = caught
    with lock:
        abandoned = task.abandoned
    if abandoned:
        task.drop(result, error)
    else:
        _post(task, result, error)


def _post(task: _Task, result: Any, error: BaseException | None) -> None:
    try:
        task.loop.call_soon_threadsafe(_deliver, task, result, error)
    except RuntimeError:  # the loop is closed
        task.drop(result, error)


def _deliver(task: _Task, result: Any, error: BaseException | None) -> None:
    if task.future.done():  # the caller went between the thread's look and this callback
        task.drop(result, error)
    elif error is not None:
        task.future.set_exception(error)
    else:
        task.future.set_result(result)
