"""What operators ask of a store: what is in it, whether it is whole, and to throw away what is of no use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from heapq import merge
from itertools import islice
from pathlib import Path

from spolia_core.digests import FRAME_BYTES
from spolia_core.errors import SpoliaError
from spolia_core.ids import FORMAT_VERSION
from spolia_kvstore.catalog import Totals
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_rows import name_of
from spolia_kvstore.disk_tier import DiskTier
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.ram_tier import StoredObject
from spolia_kvstore.store import KVStore
from spolia_kvstore.usage import Usage
from spolia_kvstore.verify import KNOWN_CODECS, ObjectVerifier

LOOKED_AT_ONCE = 256
"""Objects that a collection looks at before it lets others have their turn."""


class ObjectState(IntEnum):
    """Whether an object can be served. Values equal the protos' enum numbers."""

    SERVED = 1
    UNKNOWN_FORMAT = 2
    UNKNOWN_CODEC = 3
    UNKNOWN_FINGERPRINT = 4


@dataclass(frozen=True, slots=True)
class Listed:
    """An object, with the tiers it is on and what keeps it. Times are seconds."""

    record: ObjectRecord
    tiers: tuple[Tier, ...]
    state: ObjectState
    age_s: float
    idle_s: float
    hits: int
    pins: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Damage:
    """A copy that failed its check."""

    key: ObjectKey
    tier: Tier
    reason: str


@dataclass(slots=True)
class Verified:
    """Copies checked so far, of `num_total`."""

    num_total: int
    num_checked: int = 0
    bytes_checked: int = 0
    damaged: list[Damage] = field(default_factory=list)


@dataclass(slots=True)
class Collected:
    """What was of no use."""

    orphans: Totals = field(default_factory=Totals)
    lost_rows: int = 0
    quarantined: Totals = field(default_factory=Totals)
    dropped: Totals = field(default_factory=Totals)


class Housekeeping:
    """Works on one store. `served_fingerprints` tells which models nodes serve now; empty where that is not known."""

    def __init__(self, store: KVStore, served_fingerprints: Callable[[], Collection[bytes]]) -> None:
        self._store = store
        self._served = served_fingerprints

    def list(self, tenant_id: str = "", id_prefix: bytes = b"", limit: int = 0) -> Iterator[Listed]:
        """What is here, one tenant's or all, by tenant and id."""
        served = self._served()
        for record, usage, tiers in islice(self._everything(tenant_id, id_prefix), limit or None):
            yield self._listed(record, usage, tiers, served)

    async def verify(self, tenant_id: str, keys: Sequence[ObjectKey]) -> AsyncIterator[Verified]:
        """Reads every copy and checks every digest; takes damaged ones out of service. Yields after each copy."""
        tiers = self._store.tiers
        wanted = set(keys)
        in_memory = [
            stored for stored in tiers.ram if (stored.record.key in wanted if wanted else _is_of(stored, tenant_id))
        ]
        disk = tiers.disk
        progress = Verified(len(in_memory) + self._num_on_disk(tenant_id, keys))
        for stored in in_memory:
            if tiers.ram.find(stored.record.key) is stored:
                self._verify_memory(stored, progress)
                await asyncio.sleep(0)  # others first: this is all computation
                yield progress
        if disk is not None:
            rows = iter(disk.rows.find(keys).values()) if keys else disk.rows.walk(tenant_id)
            for row in rows:
                await self._verify_file(disk, row, progress)
                yield progress
        yield progress

    async def collect(self, *, drop_unknown: bool, idle_s: float, dry_run: bool) -> Collected:
        """Throws away orphans, rows without a file, and what is in quarantine; what else, the arguments say."""
        collected = Collected()
        disk = self._store.tiers.disk
        if disk is not None:
            await self._collect_files(disk, collected, dry_run=dry_run)

        def is_of_no_use(item: Listed) -> bool:
            return not item.pins and (
                (drop_unknown and item.state in (ObjectState.UNKNOWN_FORMAT, ObjectState.UNKNOWN_CODEC))
                or (idle_s > 0 and item.idle_s >= idle_s)
            )

        if drop_unknown or idle_s > 0:
            collected.dropped = await self._drop(is_of_no_use, dry_run=dry_run)
        return collected

    async def _drop(self, is_of_no_use: Callable[[Listed], bool], *, dry_run: bool) -> Totals:
        """Looks at all that is here, some of it at a time, and deletes what is of no use; what that was."""
        dropped = Totals()
        listed = self.list()
        while batch := list(islice(listed, LOOKED_AT_ONCE)):
            found = self._store.tiers.find([item.record.key for item in batch if is_of_no_use(item)])
            doomed = [  # asked again, since the list is of what was here when it began
                each.record
                for each in found.values()
                if is_of_no_use(self._listed(each.record, each.usage, (each.tier,), ()))
            ]
            dropped = Totals(
                dropped.num_objects + len(doomed), dropped.num_bytes + sum(record.size_bytes for record in doomed)
            )
            if doomed and not dry_run:
                await self._store.delete([record.key for record in doomed])
            await asyncio.sleep(0)  # others first
        return dropped

    def _everything(self, tenant_id: str, id_prefix: bytes) -> Iterator[tuple[ObjectRecord, Usage, tuple[Tier, ...]]]:
        tiers = self._store.tiers
        in_memory = {
            stored.record.key: (stored.record, stored.usage, (Tier.RAM, Tier.DISK) if stored.on_disk else (Tier.RAM,))
            for stored in tiers.ram
            if _is_of(stored, tenant_id) and stored.record.key.chunk_id.startswith(id_prefix)
        }
        rows = tiers.disk.rows.walk(tenant_id, id_prefix) if tiers.disk is not None else iter(())
        only_on_disk = ((row.record, row.usage, (Tier.DISK,)) for row in rows if row.record.key not in in_memory)
        return merge((in_memory[key] for key in sorted(in_memory)), only_on_disk, key=lambda item: item[0].key)

    def _listed(self, record: ObjectRecord, usage: Usage, tiers: tuple[Tier, ...], served: Collection[bytes]) -> Listed:
        now = self._store.tiers.clock()
        return Listed(
            record,
            tiers,
            _state_of(record, served),
            max(0.0, now - usage.stored_at),
            max(0.0, now - usage.used_at),
            usage.hits,
            tuple(self._store.pins.of(record.key)),
        )

    def _num_on_disk(self, tenant_id: str, keys: Sequence[ObjectKey]) -> int:
        disk = self._store.tiers.disk
        if disk is None:
            return 0
        if keys:
            return len(disk.rows.find(keys))
        totals = self._store.catalog.totals_by_tenant(Tier.DISK)
        return totals.get(tenant_id, Totals()).num_objects if tenant_id else len(disk)

    def _verify_memory(self, stored: StoredObject, progress: Verified) -> None:
        verifier = ObjectVerifier(stored.record)
        for piece in stored.extent.pieces(0, stored.size):
            verifier.feed(piece)
        progress.num_checked += 1
        progress.bytes_checked += stored.size
        try:
            verifier.finish()
        except SpoliaError as error:
            self._store.note_damage()
            self._store.tiers.discard(stored)
            progress.damaged.append(Damage(stored.record.key, Tier.RAM, error.message))

    async def _verify_file(self, disk: DiskTier, row: Row, progress: Verified) -> None:
        key, size = row.record.key, row.record.size_bytes
        disk.hold(key)
        try:
            progress.num_checked += 1
            file = await disk.open(row)
            try:
                verifier = ObjectVerifier(row.record)
                for start in range(0, size, FRAME_BYTES):
                    end = min(start + FRAME_BYTES, size)
                    verifier.feed(await disk.in_thread(partial(file.read, start, end)))
            finally:
                file.close()
            progress.bytes_checked += size
            verifier.finish()
        except OSError as error:
            await disk.note_read_error(row, error)
            progress.damaged.append(Damage(key, Tier.DISK, str(error)))
        except SpoliaError as error:
            if _state_of(row.record, ()) is ObjectState.SERVED:  # of an unknown format nothing can be said
                self._store.note_damage()
                await disk.take_out(row, error.message)
                progress.damaged.append(Damage(key, Tier.DISK, error.message))
        finally:
            disk.release(key)

    async def _collect_files(self, disk: DiskTier, collected: Collected, *, dry_run: bool) -> None:
        for tenant_id in await disk.in_thread(disk.files.tenants):
            shelves = await disk.in_thread(partial(disk.files.shelves, tenant_id))
            for first_byte in sorted(shelves | self._store.catalog.first_bytes(Tier.DISK, tenant_id)):
                await self._collect_shelf(disk, tenant_id, first_byte, collected, dry_run=dry_run)
        sizes = await disk.in_thread(disk.files.quarantined)
        collected.quarantined = Totals(len(sizes), sum(sizes))
        if not dry_run:
            await disk.in_thread(disk.files.empty_quarantine)

    async def _collect_shelf(
        self, disk: DiskTier, tenant_id: str, first_byte: int, collected: Collected, *, dry_run: bool
    ) -> None:
        # Rows are read before and after the folder: what is written or deleted meanwhile is in only one of the two.
        before = {name_of(row) for row in disk.rows.walk(tenant_id, bytes([first_byte]))}
        shelf = await disk.in_thread(partial(disk.files.shelf, tenant_id, first_byte))
        after = {name_of(row): row for row in disk.rows.walk(tenant_id, bytes([first_byte]))}
        orphans = [
            file
            for file in shelf
            if file.name is None or not (file.name in before or file.name in after or disk.is_writing(file.name))
        ]
        there = {file.name for file in shelf}
        lost = [row for name, row in after.items() if name in before and name not in there]
        collected.orphans = Totals(
            collected.orphans.num_objects + len(orphans),
            collected.orphans.num_bytes + sum(file.size_bytes for file in orphans),
        )
        collected.lost_rows += len(lost)
        if not dry_run:
            await disk.in_thread(partial(_unlink, [file.path for file in orphans]))
            for row in lost:
                await disk.take_out(row, "its file is gone")


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _is_of(stored: StoredObject, tenant_id: str) -> bool:
    return not tenant_id or stored.record.key.tenant_id == tenant_id


def _state_of(record: ObjectRecord, served: Collection[bytes]) -> ObjectState:
    if record.format_version != FORMAT_VERSION:
        return ObjectState.UNKNOWN_FORMAT
    if record.codec not in KNOWN_CODECS:
        return ObjectState.UNKNOWN_CODEC
    if served and record.fingerprint not in served:
        return ObjectState.UNKNOWN_FINGERPRINT
    return ObjectState.SERVED
