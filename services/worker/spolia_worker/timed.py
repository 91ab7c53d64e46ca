"""How long the engine took, measured where it works: waiting for its thread is no computation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from spolia_engine.steps import Steps

T = TypeVar("T")


@dataclass(frozen=True)  # no slots: a generic class cannot have them before Python 3.12
class Timed(Generic[T]):
    """What was made, and the seconds it took."""

    result: T
    seconds: float


def timed_steps(steps: Steps[T]) -> Steps[Timed[T]]:
    """The steps, and the seconds the engine was at them: not what ran between two of them, nor waiting."""
    seconds = 0.0
    try:
        while True:
            started = time.perf_counter()
            try:
                pause = next(steps)
            except StopIteration as end:
                return Timed(end.value, seconds + time.perf_counter() - started)
            seconds += time.perf_counter() - started
            yield pause
    finally:
        steps.close()
