"""How long the engine took, measured where it works: waiting for its thread is no computation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from spolia_engine.steps import Came, Ran, Steps, go_on

T = TypeVar("T")


@dataclass(frozen=True)  # no slots: a generic class cannot have them before Python 3.12
class Timed(Generic[T]):
    """What was made, and the seconds it took."""

    result: T
    seconds: float


def timed_steps(steps: Steps[T]) -> Steps[Timed[T]]:
    """The steps, and the seconds the engine was at them: not what ran between two of them, nor waiting.

    Of a pass that they shared with others, their share.
    """
    seconds = 0.0
    came: Came | None = None
    try:
        while True:
            started = time.perf_counter()
            try:
                pause = go_on(steps, came)
            except StopIteration as end:
                return Timed(end.value, seconds + time.perf_counter() - started)
            seconds += time.perf_counter() - started
            try:
                came = yield pause
            except Exception as error:  # the steps' to handle
                came = error
            seconds += came.seconds if isinstance(came, Ran) else 0.0
    finally:
        steps.close()
