"""Places for requests: so many run, those run for whom the pool has blocks, so many wait, the rest come back later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count

from spolia_core.errors import Busy
from spolia_core.sampling import MAX_SAMPLES
from spolia_engine.scheduler import State, Waiting, plan
from spolia_node.deadline import Deadline
from spolia_node.tracing import span

RETRY_AFTER_MS = 1000


class Place:
    """A request's right to run."""

    def __init__(
        self, admission: Admission, number: int, num_tokens: int, num_places: int = 1, *, is_beside: bool = False
    ) -> None:
        self._admission = admission
        self.number = number
        """Its order of arrival; those of one request follow each other."""
        self.num_places = num_places
        """How many of `max_running` it takes: its own, and those that are still to stand beside it."""
        self.is_beside = is_beside
        """One more sequence of a request that has a place."""
        self._numbers_beside = count(number + 1)
        self._queued_tokens = num_tokens
        self.promised_blocks = 0
        self.is_preparing = False

    def decodes(self) -> None:
        """Says that it holds what it was promised, and decodes. Says nothing new the second time."""
        self._admission.queued_tokens -= self._queued_tokens
        self._queued_tokens = self.promised_blocks = 0
        if self.is_preparing:
            self.is_preparing = False
            self._admission.look_again()

    @contextmanager
    def another(self) -> Iterator[Place]:
        """A place beside this one, of those it was admitted with, for another sequence of the request."""
        self.num_places -= 1
        with self._admission.joined(next(self._numbers_beside)) as place:
            yield place

    def leave(self) -> None:
        """Says that nothing is held under this place any more. Says nothing new the second time."""
        self._admission.left(self)

    async def wait_again(self, num_blocks: int, deadline: Deadline) -> None:
        """Waits for blocks after it was preempted, or got less than promised, before all who came later.

        Raises `DeadlineExceeded`.
        """
        self.promised_blocks, self.is_preparing = 0, False
        await self._admission.admitted(self, num_blocks, deadline, has_place=True)


class _Waiter:
    def __init__(self, place: Place, waiting: Waiting) -> None:
        self.place = place
        self.waiting = waiting
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Admission:
    """First come, first served, within each request's deadline; the rules are `scheduler.plan`'s. One event loop's."""

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        on_idle: Callable[[], None] = lambda: None,
        available_blocks: Callable[[], int] = lambda: 1 << 60,
    ) -> None:
        """`on_idle` is called when the last request that was here has gone; `available_blocks` counts the pool's.

        Whoever gives blocks back calls `look_again`.
        """
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._on_idle = on_idle
        self._available_blocks = available_blocks
        self._numbers = count(step=MAX_SAMPLES)
        self._waiters: list[_Waiter] = []
        self._running: list[Place] = []
        self._num_present = 0
        self.queued_tokens = 0
        """Tokens of requests that wait for a place or are being prepared: what stands before one more request."""

    @property
    def num_running(self) -> int:
        """Requests that have a place, the preempted among them. From any thread."""
        return sum(not place.is_beside for place in list(self._running))

    @property
    def num_free_places(self) -> int:
        """Sequences that may still be admitted. Below 0 while a request runs alone that takes more than there are."""
        return self._max_running - sum(place.num_places for place in self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet. From any thread."""
        return sum(not waiter.waiting.has_place for waiter in list(self._waiters))

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits. May be read from any thread."""
        return self._num_present == 0

    @property
    def has_waiters(self) -> bool:
        """Whether blocks that come free are waited for. May be read from any thread."""
        return bool(self._waiters)

    @asynccontextmanager
    async def place(
        self, deadline: Deadline, num_tokens: int = 0, num_blocks: int = 0, num_places: int = 1
    ) -> AsyncIterator[Place]:
        """Holds a place, when the pool has `num_blocks` for it and as many sequences more may run.

        Raises `Busy` when too many wait, `DeadlineExceeded` when none came free in time. `num_tokens` count as queued,
        and the blocks as promised, until `Place.decodes`.
        """
        if self.num_waiting >= self._max_waiting and not self._would_admit(num_blocks, num_places):
            raise Busy(
                f"{self.num_running} requests run and {self.num_waiting} wait",
                field="max_waiting",
                limit=str(self._max_waiting),
                actual=str(self.num_waiting),
                retry_after_ms=RETRY_AFTER_MS,
            )
        place = Place(self, next(self._numbers), num_tokens, num_places)
        with self._present(place, num_tokens):
            await self.admitted(place, num_blocks, deadline, has_place=False)
            yield place

    @contextmanager
    def joined(self, number: int) -> Iterator[Place]:
        """Holds a place beside one that is held."""
        place = Place(self, number, 0, is_beside=True)
        self._running.append(place)
        with self._present(place, 0):
            yield place

    async def admitted(self, place: Place, num_blocks: int, deadline: Deadline, *, has_place: bool) -> None:
        """Returns when `place` may take its blocks. Raises `DeadlineExceeded`."""
        waiter = _Waiter(place, Waiting(place.number, num_blocks, has_place, place.num_places))
        self._waiters.append(waiter)
        self.look_again()
        try:
            with span("wait", num_blocks=num_blocks, num_running=self.num_running, num_waiting=self.num_waiting):
                await deadline.wait(waiter.admitted, "waiting for a place")
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self.look_again()  # it may have stood before others

    def left(self, place: Place) -> None:
        """`place` stands for nothing any more."""
        if place in self._running:
            self._running.remove(place)
        self.look_again()

    def look_again(self) -> None:
        """Admits whom the rules admit now."""
        if not self._waiters:
            return
        numbers = set(plan(self._state([waiter.waiting for waiter in self._waiters])).admit)
        for waiter in [w for w in self._waiters if w.waiting.number in numbers]:
            self._waiters.remove(waiter)
            waiter.place.promised_blocks, waiter.place.is_preparing = waiter.waiting.num_blocks, True
            if waiter.place not in self._running:
                self._running.append(waiter.place)
            if not waiter.admitted.done():
                waiter.admitted.set_result(None)

    def _would_admit(self, num_blocks: int, num_places: int) -> bool:
        newest = Waiting(1 << 62, num_blocks, num_places=num_places)
        return newest.number in plan(self._state([*(waiter.waiting for waiter in self._waiters), newest])).admit

    def _state(self, waiting: list[Waiting]) -> State:
        preempted = {w.number for w in waiting if w.has_place}
        preparing = [place for place in self._running if place.is_preparing]
        return State(
            available_blocks=self._available_blocks(),
            promised_blocks=sum(place.promised_blocks for place in preparing),
            num_holding=sum(place.number not in preempted for place in self._running),
            free_places=self.num_free_places,
            waiting=waiting,
        )

    @contextmanager
    def _present(self, place: Place, num_tokens: int) -> Iterator[None]:
        self._num_present += 1
        self.queued_tokens += num_tokens
        try:
            yield
        finally:
            place.decodes()
            self._num_present -= 1
            self.left(place)
            if self.is_idle:
                self._on_idle()
