"""Claims: who computes a chunk, so that each is computed once (single flight).

The backend decides who has one, so that stores which share it grant each once. A claim ends when its owner gives it
back, when the owner's node leaves the cluster, when the chunk is stored, or when its time runs out. Waiters are woken
by each of these; they must look again, since another waiter may have been faster.

What this store granted is also kept by its embedded backend. While the shared one is away that one decides alone, and
when it is back it is told what stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

from spolia_core.errors import Unavailable
from spolia_kvstore.backend import Backend, ClaimAnswer, ClaimLease
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.objects import ObjectKey
from spolia_kvstore.owners import belongs_to

TIMER_SLACK_S = 0.001  # loop timers may fire a little before the clock says so
LOOK_AGAIN_S = 1.0
"""How often a waiter looks again by itself where the news comes from elsewhere: such news can be lost."""


class ClaimNews:
    """What a waiter listens to: set when a claim on one of its keys ended."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """A claim ended."""
        self._event.set()

    def clear(self) -> None:
        """Before looking: what ends after this is news."""
        self._event.clear()

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next news, or after `timeout_s`."""
        # Not `wait_for`: before Python 3.12 it loses a cancel that comes together with the event.
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s + TIMER_SLACK_S):
                await self._event.wait()


class Claims:
    """Claims of all tenants, as this store grants them. Used from one event loop."""

    def __init__(self, backend: Backend, local: EmbeddedBackend) -> None:
        self._backend = backend
        self._local = local
        self._waiters: dict[ObjectKey, set[ClaimNews]] = {}
        self._closed = False
        backend.on_claims_ended(self._on_ended)
        if backend is not local:
            local.on_claims_ended(self._on_ended)

    async def take(
        self, keys: Sequence[ObjectKey], owner: str, ttl_s: float, live_stores: Collection[str]
    ) -> list[ClaimAnswer]:
        """Asks the backend, the embedded one while it is away. That one knows only this store, so whoever claims has
        looked already, and better: rows may be left of what is gone."""
        if self._backend is self._local:
            return await self._local.claim(keys, owner, ttl_s, ())
        try:
            answers = await self._backend.claim(keys, owner, ttl_s, live_stores)
        except Unavailable:
            return await self._local.claim(keys, owner, ttl_s, ())
        granted = [
            key for key, answer in zip(keys, answers, strict=True) if answer.lease and answer.lease.owner == owner
        ]
        await self._local.unclaim_silently(keys)
        await self._local.claim(granted, owner, ttl_s, ())
        return answers

    async def holders(self, keys: Sequence[ObjectKey]) -> list[ClaimLease | None]:
        """The claims that stand."""
        try:
            return await self._backend.claims(keys)
        except Unavailable:
            return await self._local.claims(keys)

    async def release(self, keys: Sequence[ObjectKey], owner: str | None) -> int:
        """Ends the owner's claims, anybody's when None; how many."""
        ended = await self._local.unclaim(keys, owner)
        if self._backend is not self._local:
            with suppress(Unavailable):
                ended = await self._backend.unclaim(keys, owner)
        return sum(ended)

    async def stored(self, keys: Sequence[ObjectKey], *, is_told: bool) -> None:
        """Ends every claim on what is stored now. `is_told`: the backend knows, and has ended them."""
        await self._local.unclaim(keys, None)
        if self._backend is not self._local and not is_told:
            with suppress(Unavailable):
                await self._backend.unclaim(keys, None)

    async def end_of_node(self, node_id: str) -> int:
        """Ends the claims that this store granted to a node that is gone. Returns how many ended."""
        owner_to_keys: dict[str, list[ObjectKey]] = {}
        for key, owner in self._local.claim_owners():
            if belongs_to(owner, node_id):
                owner_to_keys.setdefault(owner, []).append(key)
        return sum([await self.release(keys, owner) for owner, keys in owner_to_keys.items()])

    async def say_again(self) -> None:
        """Tells the shared backend what this store granted while it was away. One that another store granted meanwhile
        stands: that chunk may be computed twice."""
        for key, owner in self._local.claim_owners():
            (lease,) = await self._local.claims([key])
            if lease is not None:
                await self._backend.claim([key], owner, lease.remaining_s, ())

    def num_live(self) -> int:
        """Live claims that this store granted."""
        return len(self._local.claim_owners())

    @property
    def num_waiters(self) -> int:
        """Waits under way, counted per key. Also for other threads."""
        return sum(len(waiting) for waiting in list(self._waiters.values()))

    @contextmanager
    def listening(self, keys: Collection[ObjectKey]) -> Iterator[ClaimNews]:
        """News of claims on these keys while the block runs."""
        news = ClaimNews()
        for key in keys:
            self._waiters.setdefault(key, set()).add(news)
        try:
            yield news
        finally:
            for key in set(keys):
                self._waiters[key].discard(news)
                if not self._waiters[key]:
                    del self._waiters[key]

    async def wait(self, news: ClaimNews, answers: Sequence[ClaimAnswer], timeout_s: float) -> None:
        """Returns when a claim ended or lapsed, or after `timeout_s`; sometimes sooner, so look again.

        Raises `Unavailable` once closed.
        """
        self.check_open()
        lapses = [answer.lease.remaining_s for answer in answers if answer.lease is not None]
        limit = LOOK_AGAIN_S if self._backend.is_shared else timeout_s
        await news.wait(max(0.0, min([timeout_s, limit, *lapses])))
        self.check_open()

    def close(self) -> None:
        """Ends every wait with `Unavailable`, and lets nobody wait again: the store is going away."""
        self._closed = True
        self._on_ended(list(self._waiters))

    def check_open(self) -> None:
        """Raises `Unavailable` once closed."""
        if self._closed:
            raise Unavailable("the store is shutting down; nobody can wait here for a claim")

    def _on_ended(self, keys: Sequence[ObjectKey]) -> None:
        for key in keys:
            for news in self._waiters.get(key, ()):
                news.tell()
