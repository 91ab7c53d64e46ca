"""The moment in which those go on whose jobs have ended, before the engine's thread does.

thread ── results ──▶ event loop: a sequence of each context, in the batch ── gone on ──▶ thread: the next step
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

ROUNDS = 4
"""Rounds of an event loop within which whoever waited for a job has made something of it: a decode node makes a
sequence of a context in the first."""


class HandOver:
    """The engine thread's; `ended` and `wait` are called by it alone."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: how long the thread waits at most; 0 for never."""
        self._limit_s = limit_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def ended(self, loop: asyncio.AbstractEventLoop) -> None:
        """A job ended for which somebody on `loop` waits."""
        self._loop = loop

    def wait(self, *, holds_up: bool) -> None:
        """Lets those go on whose jobs ended since the last call.

        `holds_up`: the thread has more to do. Else it sleeps, and they go on anyway.
        """
        loop, self._loop = self._loop, None
        if loop is None or not holds_up or not self._limit_s:
            return
        gone_on = threading.Event()

        def go_round(rounds: int) -> None:
            if rounds:
                loop.call_soon(go_round, rounds - 1)
            else:
                gone_on.set()

        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(go_round, ROUNDS)
            gone_on.wait(self._limit_s)
