"""Work in steps: a long computation says where others may go first, and what it waits for.

A prompt of ten thousand tokens keeps the engine busy for seconds, and a chunk that is still arriving leaves it with
nothing to do. So a pass is a generator: it yields a `Pause` at each place where it may be left alone for a while, and
returns its result. Whoever owns the engine decides what runs meanwhile; `finish` runs it through. Closing a generator
that has begun gives back everything it holds.

A pass that may share the model with others yields the rows it wants run, and is sent what came of them:

    pass ── Pause(slice) ──▶ whoever owns the engine: several slices through the model at once (`joint_pass.py`)
         ◀────── Ran ──────
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from torch import Tensor

from spolia_engine.attention import ContextAttention

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Rows of one sequence that are to go through the model, standing at `positions`; `on_layer(l)` as in
    `ModelAdapter.forward_steps`.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    attention: ContextAttention
    on_layer: Callable[[int], None] | None = None

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Ran:
    """What came of a slice: its rows' hidden states [num_rows, hidden], which may be part of a larger tensor, and its
    share of the seconds that the model took.
    """

    hidden: Tensor
    seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A place to stop at: `num_tokens` were computed since the last one.

    With `ready` the work waits for something that comes from elsewhere, and has nothing to do before `ready()` holds.
    With `slice` it goes on when it is sent what came of it. Without either it could go on at once.
    """

    num_tokens: int = 0
    ready: Callable[[], bool] | None = None
    slice: Slice | None = None


Steps: TypeAlias = Generator[Pause, Ran | None, T]
"""Work that pauses, and returns a `T`."""

Came: TypeAlias = Ran | BaseException
"""What came of a slice: its rows, or what went wrong."""


def go_on(steps: Steps[T], came: Came | None) -> Pause:
    """Runs work to its next pause, from its beginning or from one where `came` is what it waited for, if anything.

    Raises `StopIteration` with the result at its end.
    """
    return steps.throw(came) if isinstance(came, BaseException) else steps.send(came)


def finish(steps: Steps[T]) -> T:
    """Runs work through, for whoever shares the engine with nobody.

    Raises what the work raises. Work that waits cannot be finished so: what it waits for would never come; nor can work
    that wants its rows run with others'.
    """
    while True:
        try:
            pause = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if pause.slice is not None or (pause.ready is not None and not pause.ready()):
            steps.close()
            raise AssertionError(
                "this work waits for data that arrives, or for others' rows; give it to an engine thread"
            )
