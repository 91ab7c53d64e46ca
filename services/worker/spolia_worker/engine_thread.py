"""The one thread that owns the device. The event loop hands it work and never waits for it on the loop.

event loop ── run(fn), run_steps(steps) ──▶ queue ──▶ thread: a turn of work, a background step, a turn of work, …
           ◀───────────── future ───────────────┘

A turn is one function; where none waits, it is slices of jobs, each chosen anew (`job_order.py`), until the turn's
tokens are spent. Those that jobs leave to this thread go through the model together at the turn's end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from spolia_core.errors import InternalError, Unavailable
from spolia_engine.steps import Came, Slice, Steps
from spolia_worker.config import DEFAULT_SLICE_TOKENS
from spolia_worker.engine_job import EngineJob
from spolia_worker.engine_metrics import EngineMetrics
from spolia_worker.engine_task import FunctionTask, StepsTask
from spolia_worker.hand_over import HandOver
from spolia_worker.job_order import ServedTokens, choose

T = TypeVar("T")

RunSlices: TypeAlias = Callable[[Sequence[Slice]], Sequence[Came]]
"""Runs slices, and says of each what came of it. Must not raise."""


class EngineThread:
    """Runs functions one after another, jobs in steps, and between turns a background step (the decode batch).

    `background` runs one step and returns whether there is more to do. It must not raise, nor may `discard` and `skip`
    functions or the closing of steps: any of them doing so ends the thread, which `is_stalled` tells.
    """

    def __init__(
        self,
        name: str,
        background: Callable[[], bool] | None = None,
        *,
        turn_tokens: Callable[[], int] = lambda: DEFAULT_SLICE_TOKENS,
        run_slices: RunSlices | None = None,
        hand_over_s: float = 0.0,
        metrics: EngineMetrics | None = None,
    ) -> None:
        """`turn_tokens`: what jobs may compute in the next turn, so that short ones share it; one slice is run, however
        large it is. Without `run_slices` jobs may leave none to this thread.

        `hand_over_s`: how long this thread waits at most, after a turn in which jobs ended, for those who waited for
        them: what they make of it is there for the next step then, and not for the one after.
        """
        self._background = background
        self._run_slices = run_slices
        self._hand_over = HandOver(hand_over_s)
        self._turn_tokens = turn_tokens
        self._metrics = metrics
        self._served = ServedTokens()
        self._functions: deque[FunctionTask] = deque()
        self._jobs: list[StepsTask] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._has_background = False
        self._look = False
        """Whether something came since the thread last looked at its jobs."""
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Asks the thread to end after what it runs now, and waits so long. All other work fails with `Unavailable`;
        jobs that have begun are closed.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout_s)

    @property
    def queue_length(self) -> int:
        """Functions and jobs that have not begun."""
        with self._wake:
            return len(self._functions) + sum(not task.begun for task in self._jobs)

    def is_stalled(self, limit_s: float) -> bool:
        """Whether the thread is dead, or has been at one function or step for longer than `limit_s`."""
        since = self._busy_since
        return not self._thread.is_alive() or (since is not None and time.monotonic() - since > limit_s)

    def notify(self) -> None:
        """Says that the background step has work. Callable from any thread."""
        with self._wake:
            self._has_background = self._background is not None
            self._look = True
            self._wake.notify()

    def look_again(self) -> None:
        """Says that what some job waits for may be here. Callable from any thread."""
        with self._wake:
            self._look = True
            self._wake.notify()

    def submit(
        self, fn: Callable[[], T], *, discard: Callable[[T], None] | None = None, skip: Callable[[], None] | None = None
    ) -> asyncio.Future[T]:
        """Queues `fn` for the thread, before all jobs; the future gets its result, or what it raised.

        When the future is cancelled: a function that has not begun leaves the queue and `skip` is called instead; one
        under way runs to its end and its result goes to `discard`. So what `fn` takes or makes is freed on every path;
        a result that the future did deliver is its owner's. Raises `Unavailable`, after `skip`, when there is no
        thread.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = FunctionTask(future=future, discard=discard, skip=skip, fn=fn)
        self._queue(task)
        return future

    async def run(
        self, fn: Callable[[], T], *, discard: Callable[[T], None] | None = None, skip: Callable[[], None] | None = None
    ) -> T:
        """`submit`, awaited. A result that arrives as the caller is cancelled goes to `discard` too."""
        return await _taken(self.submit(fn, discard=discard, skip=skip), discard)

    def submit_steps(
        self,
        steps: Steps[T],
        job: EngineJob,
        *,
        discard: Callable[[T], None] | None = None,
        skip: Callable[[], None] | None = None,
    ) -> asyncio.Future[T]:
        """Queues work that pauses; the future gets its result, or what it raised.

        A job is left out while its pause has something to wait for: whoever brings that calls `look_again`. When the
        future is cancelled: a job that has not begun leaves the queue and `skip` is called instead; one under way is
        closed at its next pause, also while it waits, and so gives back what it holds; a result nobody takes goes to
        `discard`. Raises `Unavailable`, after `skip`, when there is no thread.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = StepsTask(future=future, discard=discard, skip=skip, steps=steps, job=job)
        self._queue(task)
        return future

    async def run_steps(
        self,
        steps: Steps[T],
        job: EngineJob,
        *,
        discard: Callable[[T], None] | None = None,
        skip: Callable[[], None] | None = None,
    ) -> T:
        """`submit_steps`, awaited. A result that arrives as the caller is cancelled goes to `discard` too."""
        return await _taken(self.submit_steps(steps, job, discard=discard, skip=skip), discard)

    def _queue(self, task: FunctionTask | StepsTask) -> None:
        task.future.add_done_callback(lambda done: self._abandon(task) if done.cancelled() else None)
        with self._wake:
            running = not self._stopping and self._thread.is_alive()
            if running:
                if isinstance(task, StepsTask):
                    self._jobs.append(task)
                else:
                    self._functions.append(task)
                self._look = True
                self._wake.notify()
        if not running:
            if task.skip:
                task.skip()
            raise Unavailable("the engine is not running")

    def _abandon(self, task: FunctionTask | StepsTask) -> None:
        with self._wake:
            task.abandoned = True
            leaves = not task.begun and self._leave(task)
            self._look = True  # what has begun is closed by the thread
            self._wake.notify()
        if leaves and task.skip:
            task.skip()

    def _leave(self, task: FunctionTask | StepsTask) -> bool:
        """Takes a task out of its queue; whether it was there. Under the lock."""
        if isinstance(task, FunctionTask) and task in self._functions:
            self._functions.remove(task)
        elif isinstance(task, StepsTask) and task in self._jobs:
            self._jobs.remove(task)
        else:
            return False
        return True

    # The thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
                self._hand_over.wait(holds_up=self._has_background or bool(self._jobs))
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
            self._wake.wait_for(lambda: self._functions or self._has_background or self._look or self._stopping)
            self._look = False  # before looking: what comes during it is looked at again
            return not self._stopping

    def _turn(self) -> None:
        function = self._next_function()
        if function is not None:
            self._execute(function)
        elif not self._run_jobs():
            return  # nothing is left, or all that is waits: the next look is when somebody says so
        self._look = True

    def _run_jobs(self) -> bool:
        """Runs slices until the turn's tokens are spent; whether it ran any."""
        with self._wake:
            standing = [task for task in self._jobs if task.is_standing]
        spent, most = sum(task.num_ahead for task in standing), self._turn_tokens()
        while (task := self._next_job()) is not None:
            if spent and spent + min(task.tokens_left, most) > most:
                break
            if not self._begin(task):
                continue
            spent += max(1, self._advance(task))
            if task.is_standing:
                standing.append(task)
            # Work that stops to wait may have run for as long as a slice and not say so.
            if task.ready is not None or self._functions or self._stopping:
                break
        self._run_together([(task, task.slice) for task in standing if task.slice is not None])
        return spent > 0

    def _run_together(self, standing: Sequence[tuple[StepsTask, Slice]]) -> None:
        """Runs the slices at which jobs stand, and these to their next pause."""
        if not standing:
            return
        self._busy_since = time.monotonic()
        slices = [each for _, each in standing]
        if self._run_slices is None:
            found: Sequence[Came] = [InternalError("this engine runs no slices of others") for _ in slices]
        else:
            found = self._run_slices(slices)
            if self._metrics:
                self._metrics.joint_pass()
        for (task, _), came in zip(standing, found, strict=True):
            self._advance(task, came)

    def _next_function(self) -> FunctionTask | None:
        with self._wake:
            task = self._functions.popleft() if self._functions else None
        if task is not None:
            self._begin(task)
        return task

    def _next_job(self) -> StepsTask | None:
        """The job whose turn it is; closes those that nobody waits for."""
        with self._wake:
            jobs = list(self._jobs)
        for task in jobs:
            if task.abandoned and task.begun:
                self._close(task)
        now = time.monotonic()
        # Outside the lock: `ready` may take one that is held where `look_again` is called.
        ready = [task for task in jobs if not task.abandoned and task.can_go_on(now)]
        # Who stands at a slice has its turn already, and stays among those who want one.
        self._served.activate({task.job.tenant_id for task in jobs if task.is_standing or task in ready})
        return ready[choose([task.as_ready(now) for task in ready], self._served)] if ready else None

    def _begin(self, task: FunctionTask | StepsTask) -> bool:
        """Marks work that is about to run; False for a job that its caller gave up just now."""
        with self._wake:
            if isinstance(task, StepsTask) and task.abandoned:
                return False
            is_first = not task.begun
            task.begun = True
        if is_first and self._metrics:
            self._metrics.began(task.kind, time.monotonic() - task.queued_at)
        return True

    def _execute(self, task: FunctionTask) -> None:
        self._busy_since = time.monotonic()
        try:
            result = task.fn()
        except StopIteration as caught:  # the one exception a future cannot carry
            self._end(task, None, InternalError(f"the engine raised {caught!r}"))
        except BaseException as caught:  # delivered to the caller, whatever it is
            self._end(task, None, caught)
        else:
            self._end(task, result, None)

    def _advance(self, task: StepsTask, came: Came | None = None) -> int:
        """Runs a job to its next pause, or its end; how many tokens that was, or will be where it stands at a slice.

        `came`: what came of the slice it stood at.
        """
        self._busy_since = time.monotonic()
        try:
            num_tokens = task.advance(came)
        except StopIteration as end:
            num_tokens = task.tokens_left
            self._count(task, num_tokens)
            self._end(task, end.value, None)
        except BaseException as caught:  # delivered to the caller, whatever it is
            num_tokens = 0  # what broke off is no slice
            self._take_back(task)
            self._end(task, None, caught)
        else:
            if task.slice is not None:
                num_tokens = task.slice.num_rows
                self._served.serve(task.job.tenant_id, num_tokens)  # now, so that the next is chosen by it
                task.num_ahead += num_tokens
            else:
                self._count(task, num_tokens)
            if task.abandoned:
                self._close(task)
        return num_tokens

    def _count(self, task: StepsTask, num_tokens: int) -> None:
        """Before the result is delivered: who has it can read of it."""
        self._served.serve(task.job.tenant_id, max(0, num_tokens - task.num_ahead))
        task.num_ahead = 0
        if self._metrics:
            self._metrics.computed(task.kind, task.job.tenant_id, num_tokens)

    def _take_back(self, task: StepsTask) -> None:
        """Slices that were chosen and came to nothing are not held against their tenant."""
        self._served.take_back(task.job.tenant_id, task.num_ahead)
        task.num_ahead = 0

    def _end(self, task: FunctionTask | StepsTask, result: object, error: BaseException | None) -> None:
        with self._wake:
            self._leave(task)
            abandoned = task.abandoned
        if abandoned:
            task.drop(result, error)
        else:
            task.post(result, error)
            if isinstance(task, StepsTask):
                self._hand_over.ended(task.loop)

    def _close(self, task: StepsTask) -> None:
        with self._wake:
            self._leave(task)
        task.slice = None
        self._take_back(task)
        task.steps.close()

    def _refuse_all(self) -> None:
        with self._wake:
            self._stopping = True
            refused: list[FunctionTask | StepsTask] = [*self._functions, *self._jobs]
            self._functions.clear()
            self._jobs.clear()
        for task in refused:
            error = Unavailable("the node is shutting down")
            if isinstance(task, StepsTask) and task.begun:
                task.steps.close()
                task.post(None, error)
            else:
                task.refuse(error)


async def _taken(future: asyncio.Future[T], discard: Callable[[T], None] | None) -> T:
    """The future's result. One that arrives as the caller is cancelled goes to `discard`."""
    try:
        return await future
    except asyncio.CancelledError:
        if discard and future.done() and not future.cancelled() and future.exception() is None:
            discard(future.result())
        raise
