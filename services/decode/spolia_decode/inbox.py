"""The way of tokens from the engine's thread to their readers on the event loop.

    engine's thread ── post, post, post, deliver ──▶ one wake-up of the loop ──▶ inbox, inbox, inbox ── take ──▶ readers
                                                                                        └── pour ──▶ where tokens go

Waking the loop costs a system call and the interpreter's lock, which the engine wants back: once a step, not once a
sequence. A reader is a coroutine at the bottom of several, and to wake it for each token costs three times what the
token does: so where tokens go to a place that takes them at once they are poured there, and the reader is woken at the
end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from spolia_core.errors import DeadlineExceeded, InternalError, SpoliaError
from spolia_engine.generation import Delta
from spolia_node.deadline import Deadline

MAX_TOGETHER = 16
"""Tokens that a reader who is behind gets at once: with 20 alternatives each they make less than 10 kB, and a message
of such steps is one that every node takes (`answer_streams.MAX_STEPS`)."""


class Preempted(Exception):
    """A sequence gave its blocks to others. What it said stands; its request may go on when there is room."""


News = Delta | SpoliaError | Preempted | None
"""What a reader is told: tokens; why there will be no more; or, by None, that the sequence is closed."""


class Inbox:
    """What one reader has still to take. One event loop's; holds no more than an answer's tokens."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[News] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._sink: Callable[[Delta], None] | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The reader's."""
        return self._loop

    def put(self, item: News) -> None:
        """Adds an item."""
        if self._sink is not None and isinstance(item, Delta):
            try:
                self._sink(item)
                return
            except SpoliaError as error:
                item = error
            except Exception as error:  # the reader's too, as others are told beside it
                item = InternalError(f"a token went nowhere: {error!r}")
            self._sink = None
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def pour(self, sink: Callable[[Delta], None]) -> None:
        """Tokens go to `sink` from now on, those first that wait; what it raises is the reader's, as all else is."""
        waiting, self._items = self._items, deque()
        self._sink = sink
        for item in waiting:
            self.put(item)

    def open(self, deadline: Deadline) -> None:
        """Has the reader told when time is up. One alarm for all it waits for: a token costs none. `close` it."""
        self._alarm = self._loop.call_later(deadline.remaining(), self._ring)

    def close(self) -> None:
        """Ends the alarm, and what was poured."""
        self._sink = None
        if self._alarm is not None:
            self._alarm.cancel()

    async def take(self) -> Delta | None:
        """The next tokens: a reader who is behind gets up to `MAX_TOGETHER` at once. None at the end.

        Raises what was put instead, after the tokens before it; and `DeadlineExceeded`, before what is left.
        """
        while not self._items:
            self._waiting = self._loop.create_future()
            await self._waiting
        item = self._items.popleft()
        if isinstance(item, SpoliaError | Preempted):
            raise item
        if item is None:
            return None
        while self._items and isinstance(self._items[0], Delta) and len(item.token_ids) < MAX_TOGETHER:
            item = item.then(self._items.popleft())  # type: ignore[arg-type]  # looked at just now
        return item

    def _ring(self) -> None:
        self._items.clear()
        self._sink = None
        self.put(DeadlineExceeded("decoding ran out of time"))


class Outbox:
    """What the engine's thread has to tell. That thread's alone."""

    def __init__(self) -> None:
        self._posted: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, News]]] = {}

    def post(self, inbox: Inbox, item: News) -> None:
        """Tells a reader something, at the next `deliver`."""
        self._posted.setdefault(inbox.loop, []).append((inbox, item))

    def deliver(self) -> None:
        """Wakes the readers of all that was posted."""
        posted, self._posted = self._posted, {}
        for loop, news in posted.items():
            with suppress(RuntimeError):  # the loop has ended, and its readers with it
                loop.call_soon_threadsafe(_put_all, news)


def _put_all(news: Iterable[tuple[Inbox, News]]) -> None:
    for inbox, item in news:
        inbox.put(item)
