"""Stores on one backend in memory, each with the task that keeps the index true."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fake_backend import FakeBackend, FakeShared
from kvstore_worlds import eventually
from tier_worlds import STORES, World, open_world

from spolia_kvstore.index_sync import IndexSync
from spolia_kvstore.objects import Tier


class Site:
    """A store, its way to the backend, and the task that keeps the index true."""

    def __init__(self, world: World, backend: FakeBackend) -> None:
        self.world = world
        self.backend = backend
        self.sync = IndexSync(world.store)

    async def walked(self) -> None:
        """Returns once everything was said again."""
        before = self.sync.num_walks
        self.backend.back()
        await eventually(lambda: self.sync.num_walks > before)

    async def settled(self) -> None:
        """Returns once what it had to say is said."""
        await eventually(lambda: self.world.store.index.is_idle)


@asynccontextmanager
async def open_site(shared: FakeShared, name: str, folder: Path | None = None) -> AsyncIterator[Site]:
    backend = FakeBackend(shared)
    async with open_world(folder, backend=backend, name=name, clock=shared.clock) as world:  # type: ignore[arg-type]  # has the methods that are called
        site = Site(world, backend)
        site.sync.start()
        await site.walked()
        yield site
        await site.sync.stop()


@asynccontextmanager
async def open_pair(shared: FakeShared, folder: Path) -> AsyncIterator[tuple[Site, Site]]:
    async with AsyncExitStack() as stack:
        sites = [await stack.enter_async_context(open_site(shared, name, folder / name)) for name in STORES]
        yield sites[0], sites[1]


def replicas_of(shared: FakeShared) -> set[tuple[bytes, Tier, str]]:
    return {(key.chunk_id, tier, store_id) for key, tier, store_id in shared.replicas}


def held_by(site: Site) -> set[tuple[bytes, Tier, str]]:
    name, tiers = site.world.store.name, site.world.tiers
    assert tiers.disk is not None
    on_disk = {(row.record.key.chunk_id, Tier.DISK, name) for row in tiers.disk.rows.walk()}
    return on_disk | {(stored.record.key.chunk_id, Tier.RAM, name) for stored in tiers.ram}
