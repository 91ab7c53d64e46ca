"""An event loop whose time passes at once: what waits longest takes no longer, and no busy machine makes it late."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

TURN_S = 1e-6
"""What a turn of the loop takes."""

T = TypeVar("T")


class _Jumps(selectors.DefaultSelector):
    """Waits for nothing: the time that it was to wait has passed."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is left that could go on"
        self.now_s += timeout + TURN_S
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    """For tasks of one thread, without connections or processes."""

    def __init__(self) -> None:
        self._jumps = _Jumps()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now_s


def run_jumping(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, on such a loop."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work)
