"""Keeps the shared index true for one store: says everything again when the backend was away, and from time to time.

The store is the authority on what it holds, so a backend that lost everything is whole again after one walk. What the
index still names and no store holds any more lapses there by itself, or is withdrawn when a reader asks for it here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

from spolia_core.errors import Unavailable
from spolia_kvstore.backend import Replica
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.store import KVStore
from spolia_node.directory_turns import Backoff
from spolia_node.logs import get_log

BATCH = 500
SAY_AGAIN_S = 4 * 3600.0
"""How often all is said again: well within the life of a replica's entry, a day."""

log = get_log(__name__)


class IndexSync:
    """The task that does it, where the backend is shared; otherwise it does nothing."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._backend = store.backend
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.num_walks = 0
        """Times that everything was said."""
        if self._backend.is_shared:
            self._backend.on_reconnected(self._due.set)

    def start(self) -> None:
        """Begins. Needs a running event loop."""
        if self._backend.is_shared:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="index-sync")

    async def stop(self) -> None:
        """Ends. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SAY_AGAIN_S):
                    await self._due.wait()
            self._due.clear()
            try:
                await self._say_everything()
                self.num_walks += 1
                backoff.reset()
                continue
            except Unavailable:
                pass
            except Exception:
                log.exception("the shared index was not told everything")
            await asyncio.sleep(backoff.next_s())
            self._due.set()

    async def _say_everything(self) -> None:
        await self._store.claims.say_again()
        for tier in Tier:
            await self._withdraw([key for key, gone in self._store.index.unsaid if gone is tier], tier)
        await self._store.index.bury_unburied()
        replicas = self._replicas()
        num_said = 0
        while batch := list(islice(replicas, BATCH)):
            buried = await self._backend.publish_again(batch)
            if buried:
                await self._store.index.drop_buried(buried)
            if self.num_walks == 0:  # what an earlier process of this store had in memory
                not_in_memory = [each.record.key for each in batch if each.record.key not in self._store.tiers.ram]
                await self._backend.withdraw(self._store.name, not_in_memory, Tier.RAM)
            num_said += len(batch)
            await asyncio.sleep(0)  # readers first
        log.info("shared index told everything", num_replicas=num_said)

    async def _withdraw(self, keys: Sequence[ObjectKey], tier: Tier) -> None:
        """Says what left a tier while the backend was away."""
        for start in range(0, len(keys), BATCH):
            batch = keys[start : start + BATCH]
            await self._backend.withdraw(self._store.name, batch, tier)
            self._store.index.unsaid.difference_update((key, tier) for key in batch)

    def _replicas(self) -> Iterator[Replica]:
        tiers = self._store.tiers
        for stored in tiers.ram:
            if tiers.ram.find(stored.record.key) is stored:
                yield Replica(stored.record, Tier.RAM, self._store.name, stored.usage.stored_at)
        if tiers.disk is not None:
            for row in tiers.disk.rows.walk():
                yield Replica(row.record, Tier.DISK, self._store.name, row.usage.stored_at)
