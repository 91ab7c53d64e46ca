"""A job that says what it did, for whatever the engine's thread does to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from spolia_engine.steps import Pause, Steps
from spolia_worker.engine_job import EngineJob
from spolia_worker.engine_thread import EngineThread

JOB = EngineJob("tenant", 30)


class Work:
    """Steps that note what they do, and hold something from their first step until they end."""

    def __init__(self, num_steps: int = 3, ready: Callable[[], bool] | None = None) -> None:
        self.num_steps = num_steps
        self.ready = ready
        self.trace: list[str] = []
        self.num_asked = 0

    @property
    def holds(self) -> bool:
        return "begin" in self.trace and self.trace[-1] != "end"

    def is_ready(self) -> bool:
        self.num_asked += 1
        assert self.ready is not None
        return self.ready()

    def steps(self) -> Steps[str]:
        self.trace.append("begin")
        try:
            for number in range(self.num_steps - 1):
                self.trace.append(str(number))
                yield Pause(10, self.is_ready if self.ready else None)
            self.trace.append("last")
            return "result"
        finally:
            self.trace.append("end")


@contextmanager
def breaking_thread() -> Iterator[EngineThread]:
    """A started thread with an invariant that breaks as soon as it is told of background work."""

    def background() -> bool:
        raise AssertionError("broken")

    thread = EngineThread("test-engine", background)
    threading.excepthook, hook = lambda args: None, threading.excepthook
    try:
        thread.start()
        yield thread
    finally:
        threading.excepthook = hook
