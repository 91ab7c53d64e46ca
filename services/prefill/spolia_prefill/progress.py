"""What a job has still to compute, for the node's load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from spolia_engine.steps import Came, Steps, go_on

T = TypeVar("T")


class Progress:
    """Tokens left of each part of a job. A part is told by one side at a time: the engine's thread, or the loop."""

    def __init__(self, part_tokens: Sequence[int]) -> None:
        self._left = list(part_tokens)

    @property
    def tokens_left(self) -> int:
        """Of all parts."""
        return sum(self._left)

    def computed(self, part: int, num_tokens: int) -> None:
        """So many tokens of a part are done, or need not be."""
        self._left[part] = max(0, self._left[part] - num_tokens)

    def finished(self, part: int) -> None:
        """Nothing of a part is left."""
        self._left[part] = 0

    def following(self, part: int, steps: Steps[T]) -> Steps[T]:
        """The steps, each told of as it is done."""
        came: Came | None = None
        try:
            while True:
                try:
                    pause = go_on(steps, came)
                except StopIteration as end:
                    result: T = end.value
                    return result
                self.computed(part, pause.num_tokens)
                try:
                    came = yield pause
                except Exception as error:  # the steps' to handle
                    came = error
        finally:
            steps.close()
