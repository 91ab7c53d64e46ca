"""Requests that come at once, one after the other."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets one through in a turn of the event loop, in the order they come. One event loop's.

    Without it a loop does the first step for everybody, then the second for everybody: of 32 requests that come at once
    none would reach a decode node before all of them were read.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turning = False

    async def through(self) -> None:
        """Returns when it is this caller's turn: now, where nobody else came in this turn of the loop."""
        if self._is_turning:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
            return
        self._is_turning = True
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # done: its caller has gone
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._turn)
                return
        self._is_turning = False
