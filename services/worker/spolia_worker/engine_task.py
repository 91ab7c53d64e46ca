"""Work in the engine's thread, and the way of its result back to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spolia_engine.steps import Came, Slice, Steps, go_on
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.job_order import ReadyJob


@dataclass(slots=True, eq=False, kw_only=True)
class Task:
    """Something to do, who waits for it, and what to do when nobody does."""

    future: asyncio.Future[Any]
    discard: Callable[[Any], None] | None
    skip: Callable[[], None] | None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    queued_at: float = field(default_factory=time.monotonic)
    begun: bool = False
    abandoned: bool = False

    @property
    def kind(self) -> WorkKind:
        """What it is, for metrics."""
        return WorkKind.FUNCTION

    def refuse(self, error: BaseException) -> None:
        """It will not begin."""
        if self.skip:
            self.skip()
        self.post(None, error)

    def drop(self, result: Any, error: BaseException | None) -> None:
        """Nobody takes what came of it."""
        if error is None and self.discard:
            self.discard(result)

    def post(self, result: Any, error: BaseException | None) -> None:
        """Sends what came of it to the future. From the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self._deliver, result, error)
        except RuntimeError:  # the loop is closed
            self.drop(result, error)

    def _deliver(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():  # the caller went between the thread's look and this callback
            self.drop(result, error)
        elif error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


@dataclass(slots=True, eq=False, kw_only=True)
class FunctionTask(Task):
    """A function, run whole."""

    fn: Callable[[], Any]


@dataclass(slots=True, eq=False, kw_only=True)
class StepsTask(Task):
    """Work in steps, and where it stands."""

    steps: Steps[Any]
    job: EngineJob
    num_computed: int = 0
    """Tokens, up to the pause it stands at."""
    ready: Callable[[], bool] | None = None
    """What it waits for, if anything."""
    slice: Slice | None = None
    """What it wants run next, if anything: then it stands until it gets what came of that."""
    num_ahead: int = 0
    """Tokens that its tenant was served as slices were chosen, and that are not computed yet."""
    ready_since: float = field(default_factory=time.monotonic)
    """When it last ran, came, or had its data."""

    @property
    def kind(self) -> WorkKind:
        """What it is, for metrics."""
        return self.job.kind

    @property
    def tokens_left(self) -> int:
        """What it will still compute, by what was said of it."""
        return max(0, self.job.num_tokens - self.num_computed)

    @property
    def is_standing(self) -> bool:
        """Whether it waits for what comes of its slice."""
        return self.slice is not None and not self.abandoned

    def as_ready(self, now: float) -> ReadyJob:
        """How `job_order` sees it."""
        return ReadyJob(self.job.tenant_id, self.tokens_left, now - self.ready_since, self.begun)

    def can_go_on(self, now: float) -> bool:
        """Whether what it waits for is here."""
        if self.slice is not None:
            return False
        if self.ready is not None and _holds(self.ready):
            self.ready = None
            self.ready_since = now
        return self.ready is None

    def advance(self, came: Came | None = None) -> int:
        """Runs it to its next pause; how many tokens that was. At its end raises `StopIteration` with the result.

        `came`: what came of its slice, if it stands at one.
        """
        self.slice = None
        pause = go_on(self.steps, came)
        self.ready, self.slice = pause.ready, pause.slice
        self.ready_since = time.monotonic()
        self.num_computed += pause.num_tokens
        return pause.num_tokens


def _holds(ready: Callable[[], bool]) -> bool:
    try:
        return ready()
    except Exception:  # the work asks too, and fails with it
        return True
