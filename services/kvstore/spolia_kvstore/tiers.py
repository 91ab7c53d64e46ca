"""Where objects are: memory, disk, or both. Moves them between the two (`write_back.py` to disk) and makes room.

    Put ──▶ RAM ──written on DISK Puts, before eviction, at the end of the process──▶ RAM and disk
             ▲                                                                            │ evicted from RAM
             └──────────── read again, when it is worth more than what it displaces ──── disk ──▶ evicted

Bytes in memory are the same as in the file. Dropping an object from memory loses nothing once a file holds it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import merge

from spolia_core.chunk_object import ChunkHead
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind
from spolia_kvstore.catalog import Totals
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.cost_gate import CostGate
from spolia_kvstore.disk_tier import DiskTier
from spolia_kvstore.listeners import Listeners
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.ram_tier import RamTier, StoredObject, Upload
from spolia_kvstore.usage import ComputeCost, Usage, log_cost
from spolia_kvstore.write_back import WriteBack
from spolia_node.tracing import current_span

EVICT_AT_ONCE = 64
"""Objects looked at in a round of making room."""

MAX_ROOM_WAIT_S = 2.0
"""How long an upload waits for objects to reach the disk before they are evicted without."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object that is here: in memory, or else as a row of the disk."""

    record: ObjectRecord
    usage: Usage
    stored: StoredObject | None
    row: Row | None

    @property
    def tier(self) -> Tier:
        """The fastest tier it is on."""
        return Tier.RAM if self.stored is not None else Tier.DISK

    def is_on(self, tier: Tier) -> bool:
        """Whether this tier has it."""
        if self.stored is None:
            return tier is Tier.DISK
        return tier is Tier.RAM or self.stored.on_disk


@dataclass(slots=True)
class RamCounters:
    """Counts since the start. `lost` are evictions from memory that no file outlived."""

    evictions: int = 0
    evicted_bytes: int = 0
    lost: int = 0


@dataclass(eq=False, slots=True)
class Tiers:
    """RAM and, where there is one, disk. Used from one event loop; `clock` gives seconds since the epoch."""

    ram: RamTier
    gate: CostGate
    is_pinned: Callable[[ObjectKey], bool] = lambda key: False
    clock: Callable[[], float] = time.time
    disk: DiskTier | None = field(default=None, init=False)
    counters: RamCounters = field(default_factory=RamCounters)
    listeners: Listeners = field(default_factory=Listeners)
    compute_cost: ComputeCost = field(default_factory=ComputeCost)
    writes: WriteBack = field(init=False)

    def __post_init__(self) -> None:
        self.writes = WriteBack(self.ram, self.gate, self.listeners, self.clock)

    def add_disk(self, disk: DiskTier, *, writes_behind: bool = False) -> None:
        """Says which disk there is, before anything is stored; its `on_gone` is `row_gone`.

        `writes_behind`: somebody calls `writes.write_behind` now and then.
        """
        self.disk = self.writes.disk = disk
        self.writes.is_behind = writes_behind

    @property
    def num_transfers(self) -> int:
        """Uploads, reads and writes to disk under way."""
        return self.ram.num_transfers + (self.disk.num_readers if self.disk is not None else 0)

    def find(self, keys: Sequence[ObjectKey]) -> dict[ObjectKey, Found]:
        """What of these is here. Changes nothing."""
        found = {
            key: Found(stored.record, stored.usage, stored, None)
            for key in keys
            if (stored := self.ram.find(key)) is not None
        }
        if self.disk is not None and len(found) < len(keys):
            rows = self.disk.rows.find([key for key in keys if key not in found])
            found |= {key: Found(row.record, row.usage, None, row) for key, row in rows.items()}
        return found

    def use(self, found: Found, *, is_hit: bool) -> None:
        """Notes a use."""
        if found.stored is not None:
            self.ram.use(found.stored, self.clock(), is_hit=is_hit)
        elif found.row is not None and self.disk is not None:
            self.disk.rows.use(found.row, self.clock(), is_hit=is_hit)

    async def reserve(self, record: ObjectRecord) -> Upload:
        """Memory for an upload, after making room. Raises `AlreadyStored` when it is in memory, `Busy` without room."""
        until = time.monotonic() + MAX_ROOM_WAIT_S
        while True:
            upload = self.ram.reserve(record)
            if upload is not None:
                return upload
            missing = self.ram.missing_bytes(record.size_bytes)
            if not self.ram.can_free(missing, self._may_go):
                if not await self.writes.one_ended(until):
                    raise self.ram.no_room(record.size_bytes)
                continue
            if not self._evict_some(missing, may_wait=time.monotonic() < until):
                await self.writes.one_ended(until)

    def _evict_some(self, num_bytes: int, *, may_wait: bool) -> bool:
        """Evicts towards `num_bytes`; false when the next to go must be written first, which is under way then."""
        victims = self.ram.lowest(num_bytes, self._may_go, EVICT_AT_ONCE)
        is_worth_writing = self.writes.worth_writing() if may_wait else lambda stored: False
        num_evicted = 0
        for victim in victims:
            if not is_worth_writing(victim):
                self.evict(victim)
                num_evicted += 1
            else:
                self.writes.write_for_room(victim)
        return bool(num_evicted)

    def promote(self, row: Row) -> Upload | None:
        """Memory into which an object is copied as it is read from disk; None when what is there is worth more."""
        found = self.find([row.record.key]).get(row.record.key)
        if found is None or found.stored is not None:
            return None
        upload = self.ram.reserve(row.record)
        if upload is None:
            rank = found.usage.rank(self.ram.half_life_s)  # this use counted, which `row` may not know of
            victims = self.ram.victims(self.ram.missing_bytes(row.record.size_bytes), self._may_go, below_rank=rank)
            unwritten = list(filter(self.writes.worth_writing(), victims or ()))
            for victim in unwritten:
                self.writes.write_for_room(victim)  # it may go the next time
            if victims is None or unwritten:
                return None
            for victim in victims:
                self.evict(victim)
            upload = self.ram.reserve(row.record)
        return upload

    def row(self, key: ObjectKey) -> Row | None:
        """Its row of the disk, whether or not it is in memory too."""
        return None if self.disk is None else self.disk.rows.find([key]).get(key)

    def commit(self, upload: Upload, record: ObjectRecord, head: ChunkHead) -> StoredObject:
        """Lets a new object be found. Raises `AlreadyStored`, and frees it, when another was first."""
        stored = self.ram.commit(upload, record, self._new_usage(record, head))
        self.listeners.added(record, Tier.RAM, True)
        self.writes.note_new(stored)
        return stored

    async def replace(
        self, upload: Upload, record: ObjectRecord, head: ChunkHead, old: Row, on_replaced: Callable[[], None]
    ) -> StoredObject | None:
        """Puts a new object in the place of `old`, on disk and then in memory: one of the two is there throughout.

        None when the disk could not take it: then `old` stays. Raises `AlreadyStored` when somebody was faster.
        """
        disk, key = self.disk, record.key
        assert disk is not None
        usage = self._new_usage(record, head)
        row = Row(record, Tier.DISK, usage, upload.verifier.frame_digests, secrets.token_hex(8))

        def is_wanted() -> bool:
            found = self.row(key)
            return found is not None and found.file_id == old.file_id and key not in self.ram

        pieces = partial(upload.extent.pieces, 0, upload.extent.size)
        if not await disk.write(row, pieces, is_wanted, on_replaced):
            self.ram.abort(upload)
            return None
        stored = self.ram.commit(upload, record, usage, on_disk=True)
        self.listeners.added(record, Tier.RAM, False)
        return stored

    def commit_promoted(self, upload: Upload, row: Row) -> None:
        """Lets an object that was read from disk be found in memory too, if it still is on disk."""
        found = self.disk.rows.find([row.record.key]).get(row.record.key) if self.disk is not None else None
        if found is None or found.file_id != row.file_id or row.record.key in self.ram:
            self.ram.abort(upload)
            return
        self.ram.commit(upload, row.record, found.usage, on_disk=True)
        self.listeners.added(row.record, Tier.RAM, False)

    def evict(self, stored: StoredObject) -> None:
        """Drops an object from memory."""
        if self.ram.discard(stored):
            self.counters.evictions += 1
            self.counters.evicted_bytes += stored.size
            self.counters.lost += not stored.on_disk
            key = stored.record.key
            current_span().event("cache.evict", chunk_id=key.chunk_id.hex(), tier="ram", num_bytes=stored.size)
            if stored.on_disk and self.disk is not None:
                self.disk.rows.set_usage(stored.record.key, stored.usage)
            self._left_memory(stored)

    def discard(self, stored: StoredObject) -> bool:
        """Drops this very object from memory because it is damaged. False when it is there no more."""
        is_dropped = self.ram.discard(stored)
        if is_dropped:
            self._left_memory(stored)
        return is_dropped

    def row_gone(self, row: Row) -> None:
        """A row of the disk was deleted, evicted or taken out of service."""
        stored = self.ram.find(row.record.key)
        if stored is not None:
            stored.on_disk = False
        self.listeners.removed(row.record, Tier.DISK, stored is None)

    async def delete(self, keys: Sequence[ObjectKey]) -> list[tuple[ObjectRecord, list[Tier]]]:
        """Drops objects from every tier, and says which tiers had them. Readers that have begun finish."""
        dropped: dict[ObjectKey, tuple[ObjectRecord, list[Tier]]] = {}
        for key in keys:
            stored = self.ram.find(key)
            if stored is not None and self.ram.discard(stored):
                dropped[key] = (stored.record, [Tier.RAM])
                self._left_memory(stored)
        if self.disk is not None:
            for row in await self.disk.remove(keys):
                dropped.setdefault(row.record.key, (row.record, []))[1].append(Tier.DISK)
            await self.writes.ended_of(keys)  # they see that nobody wants the file, and delete it
        return list(dropped.values())

    def lowest_of_tenant(self, tenant_id: str, excess: Totals) -> list[ObjectKey]:
        """A tenant's objects whose loss makes up for `excess` or part of it, lowest rank first; none pinned or read."""
        in_memory = sorted(
            (self.ram.rank_of(stored), stored.record.key, stored.size)
            for stored in self.ram
            if stored.record.key.tenant_id == tenant_id and not stored.num_readers
        )
        chosen: list[ObjectKey] = []
        num_objects, num_bytes = excess.num_objects, excess.num_bytes
        for _, key, size in merge(in_memory, self._lowest_on_disk_only(tenant_id)):
            if num_objects <= 0 and num_bytes <= 0:
                break
            if not self.is_pinned(key):
                chosen.append(key)
                num_objects, num_bytes = num_objects - 1, num_bytes - size
        return chosen

    async def evict_everywhere(self, keys: Sequence[ObjectKey]) -> None:
        """Drops objects from every tier, to make room for others of their tenant."""
        for key in keys:
            stored = self.ram.find(key)
            if stored is not None:
                self.evict(stored)
        if self.disk is not None:
            await self.disk.evict(keys)

    async def close(self) -> None:
        """Waits for writes under way, and ends the disk's threads."""
        await self.writes.all_ended()
        if self.disk is not None:
            for stored in self.ram:
                if stored.on_disk:
                    self.disk.rows.set_usage(stored.record.key, stored.usage)
            await self.disk.close()

    def _may_go(self, stored: StoredObject) -> bool:
        return not self.is_pinned(stored.record.key)

    def _lowest_on_disk_only(self, tenant_id: str) -> Iterator[tuple[float, ObjectKey, int]]:
        for row in self.disk.rows.lowest_of_tenant(tenant_id) if self.disk is not None else ():
            key = row.record.key
            if not (key in self.ram or self.disk is None or self.disk.is_read(key)):
                yield row.usage.rank(self.ram.half_life_s), key, row.record.size_bytes

    def _left_memory(self, stored: StoredObject) -> None:
        self.writes.forget(stored)
        self.listeners.removed(stored.record, Tier.RAM, not stored.on_disk)

    def _new_usage(self, record: ObjectRecord, head: ChunkHead) -> Usage:
        self.compute_cost.observe(record.compute_s, record.num_tokens)
        now = self.clock()
        return Usage(now, now, log_cost=self._log_cost(record, head))

    def _log_cost(self, record: ObjectRecord, head: ChunkHead) -> float:
        num_before = head.meta.rope_base // PREFIX_CHUNK_TOKENS if record.kind is ChunkKind.PREFIX else 0
        rate = self.compute_cost.seconds_per_token
        return log_cost(record.compute_s, record.num_tokens, record.size_bytes, rate, num_before)

    def check_invariants(self) -> None:
        """Asserts that tiers agree. For tests, while nothing is being written."""
        self.ram.check_invariants()
        self.writes.check_invariants()
        if self.disk is not None:
            self.disk.check_invariants()
        rows = {row.record.key for row in self.disk.rows.walk()} if self.disk is not None else set()
        assert all(stored.on_disk == (stored.record.key in rows) for stored in self.ram)
