"""From memory to disk: which objects are worth a file, and their writes, one of each at a time.

    new ──waits──▶ due ──written──▶ on disk
                    └──refused──▶ waits again, for as long as memory holds it

Written are objects of DISK Puts, those that are about to be evicted, what has been in memory only for a while, and all
that is worth it at the end of the process.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from spolia_kvstore.catalog_row import Row
from spolia_kvstore.cost_gate import CostGate
from spolia_kvstore.disk_tier import RETRY_AFTER_S, DiskTier
from spolia_kvstore.listeners import Listeners
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.ram_tier import RamTier, StoredObject
from spolia_node.logs import get_log

log = get_log(__name__)

MAX_WRITES = 8
"""Objects written at once to make room: twice the threads of the disk."""

LOOKED_AT_ONCE = 64
"""Objects looked at before others have their turn."""


@dataclass(eq=False, slots=True)
class WriteBack:
    """Writes to the disk, if there is one: else nothing is worth a write. Used from one event loop."""

    ram: RamTier
    gate: CostGate
    listeners: Listeners
    clock: Callable[[], float]
    """Seconds since the epoch."""
    disk: DiskTier | None = None
    is_behind: bool = False
    """Whether `write_behind` is called now and then, and so what is new must be remembered for it."""

    _waiting: OrderedDict[StoredObject, None] = field(default_factory=OrderedDict)  # to be written behind, in turn
    _under_way: dict[StoredObject, asyncio.Task[bool]] = field(default_factory=dict)
    _refused_at: dict[StoredObject, float] = field(default_factory=dict)  # when the disk last would not take it

    @property
    def num_under_way(self) -> int:
        """Writes that have begun."""
        return len(self._under_way)

    def note_new(self, stored: StoredObject) -> None:
        """An object came into memory that no file holds."""
        if self.is_behind:
            self._waiting[stored] = None

    def forget(self, stored: StoredObject) -> None:
        """An object left memory."""
        self._refused_at.pop(stored, None)
        self._waiting.pop(stored, None)

    def worth_writing(self) -> Callable[[StoredObject], bool]:
        """Says, as things are now, of an object: not when a file has it, the disk cannot or would not keep it, or would
        be too slow to read it from."""
        disk = self.disk
        if disk is None or not disk.takes_writes:
            return lambda stored: False
        admits = disk.admission()

        def is_worth_writing(stored: StoredObject) -> bool:
            return (
                not stored.on_disk
                and not self._was_refused(stored)
                and not self.gate.skips(stored.record, Tier.DISK)
                and admits(stored.size, self.ram.rank_of(stored))
            )

        return is_worth_writing

    def write(self, stored: StoredObject) -> asyncio.Task[bool]:
        """Writes an object in memory to disk, once at a time. Its result: whether a file and a row hold it now."""
        task = self._under_way.get(stored)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._write(stored), name="write-object")
            self._under_way[stored] = task
            task.add_done_callback(lambda _: self._under_way.pop(stored, None))
        return task

    def write_for_room(self, stored: StoredObject) -> None:
        """Begins the write of an object that may be evicted then, unless enough are under way."""
        if len(self._under_way) < MAX_WRITES:
            self.write(stored)

    async def persist(self, stored: StoredObject) -> bool:
        """Writes an object so that it survives the process and the machine; false when the disk could not take it."""
        if self.disk is None or not await asyncio.shield(self.write(stored)):
            return False
        return await self.disk.sync()

    async def write_behind(self, delay_s: float) -> None:
        """Writes what has been in memory only for `delay_s`, oldest first, one at a time: others may need the disk.

        What the disk cannot take now waits for a later call.
        """
        if self.disk is not None and self.disk.takes_writes:
            await self._write_worthy(self._due(self.disk, self.clock() - delay_s))

    async def write_all(self) -> None:
        """Writes what is in memory only, most valuable first, so that it outlives the process. The caller bounds it."""
        self._waiting.clear()
        left = sorted((stored for stored in self.ram if not stored.on_disk), key=self.ram.rank_of)
        try:
            await self._write_worthy(reversed(left))
        finally:
            if left and self.disk is not None:
                num_written = sum(stored.on_disk for stored in left)
                log.info("memory written to disk", num_written=num_written, num_left=len(left) - num_written)

    async def one_ended(self, until: float) -> bool:
        """Waits for the writes under way; false when there are none, or not one ended by `until`, monotonic seconds."""
        if not self._under_way:
            return False
        done, _ = await asyncio.wait(list(self._under_way.values()), timeout=max(0.0, until - time.monotonic()))
        return bool(done)

    async def ended_of(self, keys: Sequence[ObjectKey]) -> None:
        """Waits for the writes under way of these objects."""
        doomed = set(keys)
        writes = [task for stored, task in self._under_way.items() if stored.record.key in doomed]
        if writes:
            await asyncio.wait(writes)

    async def all_ended(self) -> None:
        """Waits for all writes, those too that begin meanwhile."""
        while self._under_way:
            await asyncio.wait(list(self._under_way.values()))

    def _due(self, disk: DiskTier, stored_until: float) -> Iterator[StoredObject]:
        """What was stored until then and waits, once each; all of it goes on waiting once the disk takes no writes."""
        for _ in range(len(self._waiting)):
            stored = next(iter(self._waiting), None)  # others may have left since
            if stored is None or stored.usage.stored_at > stored_until or not disk.takes_writes:
                return
            if self._was_refused(stored):
                self._waiting.move_to_end(stored)
            else:
                del self._waiting[stored]
                yield stored

    async def _write_worthy(self, objects: Iterable[StoredObject]) -> None:
        """Writes those that are worth it, one after another."""
        is_worth_writing = self.worth_writing()
        for number, stored in enumerate(objects):
            if self.ram.find(stored.record.key) is stored and is_worth_writing(stored):
                await self.write(stored)
                is_worth_writing = self.worth_writing()
            elif number % LOOKED_AT_ONCE == 0:
                await asyncio.sleep(0)  # others first: so much is not worth it

    def _was_refused(self, stored: StoredObject) -> bool:
        """Whether the disk would not take it, so lately that there is no use in asking again."""
        return time.monotonic() - self._refused_at.get(stored, float("-inf")) <= RETRY_AFTER_S

    async def _write(self, stored: StoredObject) -> bool:
        disk, key = self.disk, stored.record.key
        if disk is None or stored.on_disk:
            return stored.on_disk
        if self.ram.find(key) is not stored:
            return False  # it went before its turn came, and its memory with it

        def note_listed() -> None:
            stored.on_disk = True
            self.listeners.added(stored.record, Tier.DISK, False)

        self.ram.open(stored)
        try:
            row = Row(stored.record, Tier.DISK, stored.usage, stored.frame_digests, secrets.token_hex(8))
            pieces = partial(stored.extent.pieces, 0, stored.size)
            is_there = await disk.write(row, pieces, lambda: self.ram.find(key) is stored, note_listed)
            if not is_there and self.ram.find(key) is stored:
                self._refused_at[stored] = time.monotonic()
                if self.is_behind:
                    self._waiting.setdefault(stored)
            return is_there
        finally:
            self.ram.close(stored)

    def check_invariants(self) -> None:
        """Asserts that only what is in memory waits. For tests."""
        assert all(self.ram.find(stored.record.key) is stored for stored in self._waiting)
