"""The RAM tier: objects under a byte budget.

Bytes count against the budget, in whole blocks of the arena, from the moment they are promised until nobody can touch
them:

    reserve ──▶ uploading ──commit──▶ resident ──delete / discard / evict──▶ gone
                    │                     └── while it is read ──▶ leaving ──last close──▶ gone
                    └──abort──▶ gone

Only resident objects can be found. Eviction takes the lowest rank first (`usage.py`), never what is pinned or read.
No I/O, no clock: time, pins and what may go come in as arguments.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

import xxhash

from spolia_core.digests import FRAME_BYTES
from spolia_core.errors import AlreadyStored, Busy
from spolia_kvstore.arena import BLOCK_BYTES, Arena, Extent
from spolia_kvstore.objects import ObjectKey, ObjectRecord
from spolia_kvstore.usage import Usage
from spolia_kvstore.verify import ObjectVerifier

RETRY_AFTER_MS = 1000


@dataclass(eq=False, slots=True)
class Upload:
    """Reserved memory that is being filled, and checked as it fills."""

    record: ObjectRecord
    extent: Extent
    verifier: ObjectVerifier
    num_received: int = 0
    skipped_file_id: str = ""
    """The file that held the object when the upload began, and was skipped for being slow to read."""

    @property
    def key(self) -> ObjectKey:
        """Whose memory it is."""
        return self.record.key


@dataclass(eq=False, slots=True)
class StoredObject:
    """An object in memory. `frame_digests[i]` was taken over bytes i·FRAME_BYTES … when the object arrived.

    `on_disk`: a file holds it too, so dropping it from memory loses nothing.
    """

    record: ObjectRecord
    extent: Extent
    frame_digests: tuple[bytes, ...]
    usage: Usage
    on_disk: bool = False
    num_readers: int = 0
    _rank_entry: int = field(default=0, repr=False)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.extent.size

    def frame(self, index: int) -> list[memoryview]:
        """Frame `index` where it lies, in pieces one behind the other; good while the object is open."""
        return list(self.extent.pieces(index * FRAME_BYTES, (index + 1) * FRAME_BYTES))

    def is_intact(self, index: int, pieces: Iterable[memoryview]) -> bool:
        """Whether `pieces`, frame `index`, still have the digest with which they arrived."""
        found = xxhash.xxh3_128()
        for piece in pieces:
            found.update(piece)
        return found.digest() == self.frame_digests[index]


class RamTier:
    """Objects of all tenants in memory. Never holds more than the arena's bytes."""

    def __init__(self, budget_bytes: int, half_life_s: float, block_bytes: int = BLOCK_BYTES) -> None:
        self.arena = Arena(budget_bytes, block_bytes)
        self.half_life_s = half_life_s
        self._resident: dict[ObjectKey, StoredObject] = {}
        self._leaving: set[StoredObject] = set()
        self._uploads: set[Upload] = set()
        self._ranked: list[tuple[float, int, ObjectKey]] = []
        self._entries = count(1)
        self._resident_bytes = 0
        self._num_readers = 0

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._resident

    def __iter__(self) -> Iterator[StoredObject]:
        return iter(list(self._resident.values()))

    @property
    def budget_bytes(self) -> int:
        """Bytes of the arena."""
        return self.arena.capacity_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes charged to the budget: resident, uploading and leaving, in whole blocks."""
        return self.arena.capacity_bytes - self.arena.free_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the objects that can be found."""
        return self._resident_bytes

    @property
    def num_transfers(self) -> int:
        """Uploads and reads under way."""
        return len(self._uploads) + self._num_readers

    def missing_bytes(self, size: int) -> int:
        """What must go before `size` bytes can be reserved; 0 or less when there is room."""
        return self.arena.charge(size) - self.arena.free_bytes

    def reserve(self, record: ObjectRecord) -> Upload | None:
        """Promises memory to an upload; None when there is no room. End it with `commit` or `abort`.

        Raises `AlreadyStored` when the key is resident.
        """
        if record.key in self._resident:
            raise AlreadyStored(f"chunk {record.key.chunk_id.hex()} is stored already", field="info.chunk_id")
        extent = self.arena.take(record.size_bytes)
        if extent is None:
            return None
        upload = Upload(record, extent, ObjectVerifier(record))
        self._uploads.add(upload)
        return upload

    def append(self, upload: Upload, data: bytes | memoryview) -> None:
        """Copies the next bytes into reserved memory. The caller has checked that they fit."""
        assert upload in self._uploads
        upload.verifier.feed(data)
        upload.extent.write(upload.num_received, data)
        upload.num_received += len(data)

    def commit(self, upload: Upload, record: ObjectRecord, usage: Usage, *, on_disk: bool = False) -> StoredObject:
        """Makes a full upload resident. Raises `AlreadyStored`, and frees it, when another was first."""
        assert upload.num_received == upload.extent.size
        if upload.key in self._resident:
            self.abort(upload)
            raise AlreadyStored(f"chunk {upload.key.chunk_id.hex()} was stored meanwhile", field="info.chunk_id")
        self._uploads.remove(upload)
        stored = StoredObject(record, upload.extent, upload.verifier.frame_digests, usage, on_disk)
        self._resident[upload.key] = stored
        self._resident_bytes += stored.size
        self._rank(stored)
        return stored

    def abort(self, upload: Upload) -> None:
        """Gives reserved memory back. Does nothing once the upload has ended."""
        if upload in self._uploads:
            self._uploads.remove(upload)
            self.arena.free(upload.extent)

    def find(self, key: ObjectKey) -> StoredObject | None:
        """The resident object; its bytes may only be read while it is open. Changes nothing."""
        return self._resident.get(key)

    def use(self, stored: StoredObject, now: float, *, is_hit: bool) -> None:
        """Notes a use, which keeps the object from eviction for longer."""
        stored.usage = stored.usage.used(now, self.half_life_s, is_hit=is_hit)
        if self._resident.get(stored.record.key) is stored:
            self._rank(stored)

    def open(self, stored: StoredObject) -> None:
        """Keeps the object's bytes until `close`."""
        stored.num_readers += 1
        self._num_readers += 1

    def close(self, stored: StoredObject) -> None:
        """Ends one `open`. The last reader of a leaving object frees its bytes."""
        assert stored.num_readers > 0
        stored.num_readers -= 1
        self._num_readers -= 1
        if stored.num_readers == 0 and stored in self._leaving:
            self._leaving.remove(stored)
            self.arena.free(stored.extent)

    def discard(self, stored: StoredObject) -> bool:
        """Makes this very object unfindable at once, not a later one under the same key. Readers finish.

        False when it is no longer resident.
        """
        if self._resident.get(stored.record.key) is not stored:
            return False
        del self._resident[stored.record.key]
        self._resident_bytes -= stored.size
        if stored.num_readers:
            self._leaving.add(stored)
        else:
            self.arena.free(stored.extent)
        return True

    def victims(
        self, num_bytes: int, may_go: Callable[[StoredObject], bool], *, below_rank: float = math.inf
    ) -> list[StoredObject] | None:
        """Whom to evict so that `num_bytes` more are free, lowest rank first; None when there are not enough.

        Objects being read never go, nor those that `may_go` keeps, nor those of this rank or a higher one. Changes
        nothing that can be seen.
        """
        chosen, missing = self._lowest(num_bytes, may_go, len(self._resident), below_rank)
        return chosen if missing <= 0 else None

    def can_free(self, num_bytes: int, may_go: Callable[[StoredObject], bool]) -> bool:
        """Whether evicting all that may go would free that much."""
        for stored in self._resident.values():
            if num_bytes <= 0:
                break
            if stored.num_readers == 0 and may_go(stored):
                num_bytes -= self.arena.charge(stored.size)
        return num_bytes <= 0

    def lowest(self, num_bytes: int, may_go: Callable[[StoredObject], bool], at_most: int) -> list[StoredObject]:
        """Whom to evict first towards `num_bytes` more: lowest rank first, no more than needed nor than `at_most`."""
        return self._lowest(num_bytes, may_go, at_most, math.inf)[0]

    def rank_of(self, stored: StoredObject) -> float:
        """What it is ordered by."""
        return stored.usage.rank(self.half_life_s)

    def no_room(self, size: int) -> Busy:
        """The refusal of an object for which no room can be made."""
        if self.arena.charge(size) > self.budget_bytes:
            return _no_room(size, self.budget_bytes, f"the budget is {self.budget_bytes}", retry_after_ms=0)
        reason = f"{self.missing_bytes(size)} more are pinned or in transfer"
        return _no_room(size, self.budget_bytes, reason, retry_after_ms=RETRY_AFTER_MS)

    def _lowest(
        self, num_bytes: int, may_go: Callable[[StoredObject], bool], at_most: int, below_rank: float
    ) -> tuple[list[StoredObject], int]:
        """The first `at_most` below a rank that may go, no more than needed, and the bytes still missing then."""
        chosen: list[StoredObject] = []
        passed: list[tuple[float, int, ObjectKey]] = []
        while num_bytes > 0 and len(chosen) < at_most and self._ranked and self._ranked[0][0] < below_rank:
            entry = heapq.heappop(self._ranked)
            stored = self._resident.get(entry[2])
            if stored is None or stored._rank_entry != entry[1]:
                continue  # of an object that is gone, or was used since
            passed.append(entry)
            if stored.num_readers == 0 and may_go(stored):
                chosen.append(stored)
                num_bytes -= self.arena.charge(stored.size)
        for entry in passed:
            heapq.heappush(self._ranked, entry)
        return chosen, num_bytes

    def _rank(self, stored: StoredObject) -> None:
        stored._rank_entry = next(self._entries)
        heapq.heappush(self._ranked, (self.rank_of(stored), stored._rank_entry, stored.record.key))
        if len(self._ranked) > 64 + 2 * len(self._resident):
            self._ranked = [(self.rank_of(each), each._rank_entry, each.record.key) for each in self._resident.values()]
            heapq.heapify(self._ranked)

    def check_invariants(self) -> None:
        """Asserts that every block is counted once and no reader is forgotten. For tests."""
        everything = [*self._resident.values(), *self._leaving]
        extents = [stored.extent for stored in everything] + [upload.extent for upload in self._uploads]
        blocks = [block for extent in extents for block in extent.blocks]
        assert len(blocks) == len(set(blocks))
        assert self.held_bytes == len(blocks) * self.arena.block_bytes
        assert self._resident_bytes == sum(stored.size for stored in self._resident.values())
        assert 0 <= self.held_bytes <= self.budget_bytes
        assert all(stored.num_readers > 0 for stored in self._leaving)
        assert self._num_readers == sum(stored.num_readers for stored in everything)
        assert all(key == stored.record.key for key, stored in self._resident.items())
        assert not self._leaving & set(self._resident.values())
        assert all(upload.num_received <= upload.extent.size for upload in self._uploads)
        live = {(entry[1], entry[2]) for entry in self._ranked}
        assert all((stored._rank_entry, key) in live for key, stored in self._resident.items())


def _no_room(size: int, budget_bytes: int, reason: str, *, retry_after_ms: int) -> Busy:
    return Busy(
        f"no room for {size} bytes: {reason}",
        field="info.size_bytes",
        limit=f"{budget_bytes} bytes",
        actual=f"{size} bytes",
        retry_after_ms=retry_after_ms,
    )
