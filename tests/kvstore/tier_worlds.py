"""Stores put together by hand: real tiers of a few chunks each, and one clock for all that is set by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvstore_worlds import TENANT, Chunk, HandClock, announced, key_of, make_chunk

from spolia_core.digests import frames
from spolia_core.reuse import MissReason
from spolia_kvstore.backend import Backend
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.cost_gate import CostGate
from spolia_kvstore.disk_files import DiskFiles
from spolia_kvstore.disk_rows import name_of
from spolia_kvstore.disk_tier import DiskTier
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.entry import Reader
from spolia_kvstore.housekeeping import Housekeeping
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.quotas import Quota, Tenants
from spolia_kvstore.ram_tier import RamTier, Upload
from spolia_kvstore.recovery import Recovered, open_folder
from spolia_kvstore.store import KVStore
from spolia_kvstore.tiers import Tiers

HALF_LIFE_S = 900.0
CHUNK_BYTES = len(make_chunk(1).data)
"""Size of every chunk that `make_chunk` makes from a number alone."""

ANYONE = Reader()
STORES = {"node": "localhost:1", "other": "localhost:2"}
"""The live stores, in worlds with a backend that is shared."""


@dataclass
class World:
    """A store and what it is made of."""

    store: KVStore
    tiers: Tiers
    catalog: Catalog
    clock: HandClock
    recovered: Recovered

    @property
    def ram(self) -> RamTier:
        return self.tiers.ram

    @property
    def disk(self) -> DiskTier:
        assert self.tiers.disk is not None
        return self.tiers.disk

    @property
    def admin(self) -> Housekeeping:
        return Housekeeping(self.store, lambda: ())

    async def filled(self, chunk: Chunk, tenant_id: str = TENANT, *, owner: str = "", durable: bool = False) -> Upload:
        """An upload whose bytes have all come."""
        upload = await self.store.puts.begin(announced(chunk, tenant_id), owner, durable=durable)
        for offset, piece, piece_digest in frames(chunk.data):
            self.store.puts.append_frame(upload, offset, piece, piece_digest)
        return upload

    async def put(self, *chunks: Chunk, tenant_id: str = TENANT, durable: bool = False) -> list[ObjectRecord]:
        """Stores chunks, each a little later than the one before, so that which is older is never in doubt."""
        records = []
        for chunk in chunks:
            self.clock.now += 2.0
            upload = await self.filled(chunk, tenant_id, durable=durable)
            try:
                records.append(await self.store.puts.finish(upload, durable=durable))
            finally:
                self.store.puts.abort(upload)
        return records

    async def put_on_disk_only(self, *chunks: Chunk, tenant_id: str = TENANT) -> None:
        """Stores chunks and drops them from memory."""
        for chunk in chunks:
            await self.put(chunk, tenant_id=tenant_id, durable=True)
            self.drop_from_memory(key_of(chunk, tenant_id))

    def drop_from_memory(self, key: ObjectKey) -> None:
        stored = self.ram.find(key)
        assert stored is not None
        self.tiers.evict(stored)

    def file_of(self, chunk: Chunk, tenant_id: str = TENANT) -> Path:
        """Where a chunk is on disk."""
        (row,) = self.disk.rows.find([key_of(chunk, tenant_id)]).values()
        return self.disk.files.path_of(name_of(row))

    async def get(
        self, *chunks: Chunk, tenant_id: str = TENANT, reader: Reader = ANYONE
    ) -> list[tuple[Tier, bytes] | MissReason]:
        """What a Get gives, all its frames joined."""
        answers: list[tuple[Tier, bytes] | MissReason] = []
        async with self.store.reading([key_of(chunk, tenant_id) for chunk in chunks], reader) as readings:
            for reading in readings:
                entry = await self.store.begin(reading)
                if entry.record is None or entry.tier is None:
                    assert entry.miss is not None
                    answers.append(entry.miss)
                else:
                    answers.append((entry.tier, b"".join([b"".join(frame.pieces) async for frame in reading.frames()])))
        return answers

    def where(self, *chunks: Chunk, tenant_id: str = TENANT) -> list[str]:
        """Tiers of each chunk: "", "RAM", "DISK" or "RAM+DISK"."""
        keys = [key_of(chunk, tenant_id) for chunk in chunks]
        rows = self.tiers.disk.rows.find(keys) if self.tiers.disk is not None else {}
        return ["+".join(["RAM"] * (key in self.ram) + ["DISK"] * (key in rows)) for key in keys]


@asynccontextmanager
async def open_world(
    folder: Path | None = None,
    *,
    num_in_memory: int = 4,
    num_on_disk: int = 8,
    default_quota: Quota | None = None,
    quotas: Mapping[str, Quota] | None = None,
    cost_gate: bool = False,
    clock: HandClock | None = None,
    backend: Backend | None = None,
    name: str = "node",
    is_killed: bool = False,
) -> AsyncIterator[World]:
    """A store with room for so many chunks; with a disk where there is a folder. `is_killed`: it does not end well."""
    clock = clock or HandClock()
    opened = open_folder(folder, HALF_LIFE_S) if folder is not None else None
    catalog = Catalog(half_life_s=HALF_LIFE_S) if opened is None else opened.catalog
    ram = RamTier(num_in_memory * CHUNK_BYTES, HALF_LIFE_S, block_bytes=16)
    tiers = Tiers(ram, CostGate(enabled=cost_gate, clock=clock), clock=clock)
    if opened is not None:
        tiers.add_disk(make_disk(opened.files, catalog, num_on_disk, tiers))
    local = EmbeddedBackend(catalog, clock, clock)
    store = KVStore(
        tiers,
        catalog,
        local,
        backend or local,
        Tenants(default_quota, quotas),
        name=name,
        max_object_bytes=1 << 20,
        stores=lambda: STORES,
        clock=clock,
    )
    try:
        yield World(store, tiers, catalog, clock, Recovered() if opened is None else opened.recovered)
        await tiers.writes.all_ended()
        store.check_invariants()
    finally:
        if not is_killed:
            await store.close()
        catalog.close()


def make_disk(files: DiskFiles, catalog: Catalog, num_chunks: int, tiers: Tiers) -> DiskTier:
    """A disk tier with room for so many chunks, under the tiers' pins."""
    return DiskTier(
        files,
        catalog,
        num_chunks * CHUNK_BYTES,
        HALF_LIFE_S,
        may_go=lambda key: not tiers.is_pinned(key),
        on_gone=tiers.row_gone,
    )
