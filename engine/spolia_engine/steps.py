"""Work in steps: a long computation says where others may go first, and what it waits for.

A prompt of ten thousand tokens keeps the engine busy for seconds, and a chunk that is still arriving leaves it with
nothing to do. So a pass is a generator: it yields a `Pause` at each place where it may be left alone for a while, and
returns its result. Whoever owns the engine decides what runs meanwhile; `finish` runs it through. Closing a generator
that has begun gives back everything it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pause:
    """A place to stop at: `num_tokens` were computed since the last one.

    With `ready` the work waits for something that comes from elsewhere, and has nothing to do before `ready()` holds;
    without, it could go on at once.
    """

    num_tokens: int = 0
    ready: Callable[[], bool] | None = None


Steps: TypeAlias = Generator[Pause, None, T]
"""Work that pauses, and returns a `T`."""


def finish(steps: Steps[T]) -> T:
    """Runs work through, for whoever shares the engine with nobody.

    Raises what the work raises. Work that waits cannot be finished so: what it waits for would never come.
    """
    while True:
        try:
            pause = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if pause.ready is not None and not pause.ready():
            steps.close()
            raise AssertionError("this work waits for data that arrives; give it to an engine thread")
