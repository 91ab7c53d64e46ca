"""Claims: who computes a chunk, so that each is computed once (single flight).

A claim ends when its owner gives it back, when the owner's node leaves the cluster, when the chunk is stored, or when
its time runs out. Waiters are woken by
each of these; they must look again, since another waiter may have been faster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from spolia_core.errors import Unavailable
from spolia_kvstore.objects import ObjectKey
from spolia_kvstore.owners import belongs_to

SWEEP_EVERY_S = 1.0
TIMER_SLACK_S = 0.001  # loop timers may fire a little before the clock says so


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim. `expires_at` is on the clock of its `Claims`."""

    owner: str
    expires_at: float


class Claims:
    """Claims of all tenants. Used from one event loop; `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._claims: dict[ObjectKey, Claim] = {}
        self._waiters: dict[ObjectKey, set[asyncio.Event]] = {}
        self._next_sweep = 0.0
        self._closed = False

    def holder(self, key: ObjectKey) -> Claim | None:
        """The live claim on `key`."""
        claim = self._claims.get(key)
        return claim if claim is not None and claim.expires_at > self._clock() else None

    def take(self, key: ObjectKey, owner: str, ttl_s: float) -> Claim:
        """Claims `key`, or renews the owner's claim, unless another holds it. The claim that now stands is returned."""
        self._sweep()
        current = self.holder(key)
        if current is not None and current.owner != owner:
            return current
        claim = Claim(owner, self._clock() + ttl_s)
        self._claims[key] = claim
        return claim

    def release(self, key: ObjectKey, owner: str) -> bool:
        """Ends the owner's claim; false, and nothing changes, when it holds none."""
        current = self.holder(key)
        if current is None or current.owner != owner:
            return False
        self.end(key)
        return True

    def end(self, key: ObjectKey) -> None:
        """Ends whatever claim stands and wakes who waits for it."""
        self._claims.pop(key, None)
        for event in self._waiters.get(key, ()):
            event.set()

    def end_of_node(self, node_id: str) -> int:
        """Ends the claims of a node that is gone, and wakes who waits for them. Returns how many ended."""
        keys = [key for key, claim in self._claims.items() if belongs_to(claim.owner, node_id)]
        for key in keys:
            self.end(key)
        return len(keys)

    def num_live(self) -> int:
        """Live claims."""
        now = self._clock()
        return sum(claim.expires_at > now for claim in self._claims.values())

    @property
    def num_waiters(self) -> int:
        """Waits under way, counted per key."""
        return sum(len(events) for events in self._waiters.values())

    async def wait_change(self, keys: Collection[ObjectKey], until: float) -> None:
        """Returns when a claim on one of `keys` ended or lapsed, or at `until`; sometimes sooner, so look again.

        Raises `Unavailable` once closed.
        """
        self._check_open()
        lapses = [claim.expires_at for key in keys if (claim := self.holder(key)) is not None]
        if len(lapses) < len(keys):
            return
        timeout_s = max(0.0, min([until, *lapses]) - self._clock()) + TIMER_SLACK_S
        # Not `wait_for`: before Python 3.12 it loses a cancel that comes together with the event.
        with self._listening(keys) as event, suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
        self._check_open()

    def close(self) -> None:
        """Ends every wait with `Unavailable`, and lets nobody wait again: the store is going away."""
        self._closed = True
        for events in self._waiters.values():
            for event in events:
                event.set()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is shutting down; nobody can wait here for a claim")

    @contextmanager
    def _listening(self, keys: Collection[ObjectKey]) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        for key in keys:
            self._waiters.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            for key in set(keys):
                self._waiters[key].discard(event)
                if not self._waiters[key]:
                    del self._waiters[key]

    def _sweep(self) -> None:
        """Forgets lapsed claims now and then, so that those nobody asks about again do not pile up."""
        now = self._clock()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_EVERY_S
            self._claims = {key: claim for key, claim in self._claims.items() if claim.expires_at > now}
