"""Work in the engine's thread, and the way of its result back to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spolia_engine.steps import Pause, Steps
from spolia_worker.engine_job import EngineJob


@dataclass(slots=True, eq=False, kw_only=True)
class Task:
    """Something to do, who waits for it, and what to do when nobody does."""

    future: asyncio.Future[Any]
    discard: Callable[[Any], None] | None
    skip: Callable[[], None] | None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    begun: bool = False
    abandoned: bool = False

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
    pause: Pause | None = None
    """Where it stopped last."""

    def can_go_on(self) -> bool:
        """Whether what it waits for is here."""
        if self.pause is None or self.pause.ready is None:
            return True
        try:
            return self.pause.ready()
        except Exception:  # the work asks too, and fails with it
            return True
