"""The RAM tier: objects under a byte budget.

Bytes count against the budget from the moment they are promised until nobody can touch them:

    reserve ──▶ uploading ──commit──▶ resident ──delete / discard / evict──▶ gone
                    │                     └── while it is read ──▶ leaving ──last close──▶ gone
                    └──abort──▶ gone

Only resident objects can be found. Eviction takes the least recently used object that is neither pinned nor read.
No I/O, no clock: pins come in as a predicate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from spolia_core.digests import FRAME_BYTES, digest
from spolia_core.errors import AlreadyStored, Busy
from spolia_kvstore.objects import ObjectKey, ObjectRecord

RETRY_AFTER_MS = 1000


@dataclass(eq=False, slots=True)
class Upload:
    """Reserved memory that is being filled. `evicted` are the objects that made room for it."""

    key: ObjectKey
    data: bytearray
    evicted: tuple[ObjectKey, ...] = ()
    num_received: int = 0


@dataclass(eq=False, slots=True)
class StoredObject:
    """An object in memory. `frame_digests[i]` was taken over bytes i·FRAME_BYTES … when the object arrived."""

    record: ObjectRecord
    data: bytearray
    frame_digests: tuple[bytes, ...]
    num_readers: int = 0

    def frame(self, index: int) -> memoryview:
        """The bytes of frame `index`; a view, valid while the object is open."""
        return memoryview(self.data)[index * FRAME_BYTES : (index + 1) * FRAME_BYTES]

    def is_intact(self, index: int) -> bool:
        """Whether frame `index` still has the digest it arrived with."""
        return digest(self.frame(index)) == self.frame_digests[index]


class ObjectStore:
    """Objects of all tenants in memory, least recently used first. Never holds more than `budget_bytes`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._resident: OrderedDict[ObjectKey, StoredObject] = OrderedDict()
        self._leaving: set[StoredObject] = set()
        self._uploads: set[Upload] = set()
        self._held_bytes = 0
        self._resident_bytes = 0
        self._num_readers = 0

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._resident

    @property
    def held_bytes(self) -> int:
        """Bytes charged to the budget: resident, uploading and leaving."""
        return self._held_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the objects that can be found."""
        return self._resident_bytes

    @property
    def num_transfers(self) -> int:
        """Uploads and reads under way."""
        return len(self._uploads) + self._num_readers

    def reserve(self, key: ObjectKey, size_bytes: int, is_pinned: Callable[[ObjectKey], bool]) -> Upload:
        """Makes room and promises it. The caller must end the upload with `commit` or `abort`.

        Raises `AlreadyStored` when the key is resident, `Busy` when there is no room; then nothing was evicted.
        """
        if key in self._resident:
            raise AlreadyStored(f"chunk {key.chunk_id.hex()} is stored already", field="info.chunk_id")
        victims = self._victims(size_bytes, is_pinned)
        for victim in victims:
            self._remove(self._resident[victim])
        upload = Upload(key, bytearray(size_bytes), tuple(victims))
        self._uploads.add(upload)
        self._held_bytes += size_bytes
        return upload

    def append(self, upload: Upload, data: bytes) -> None:
        """Copies the next bytes into reserved memory. The caller has checked that they fit."""
        end = upload.num_received + len(data)
        assert upload in self._uploads
        assert end <= len(upload.data)
        memoryview(upload.data)[upload.num_received : end] = data
        upload.num_received = end

    def commit(self, upload: Upload, record: ObjectRecord, frame_digests: tuple[bytes, ...]) -> StoredObject:
        """Makes a full upload resident. Raises `AlreadyStored`, and frees it, when another was first."""
        assert upload.num_received == len(upload.data)
        if upload.key in self._resident:
            self.abort(upload)
            raise AlreadyStored(f"chunk {upload.key.chunk_id.hex()} was stored meanwhile", field="info.chunk_id")
        self._uploads.remove(upload)
        stored = StoredObject(record, upload.data, frame_digests)
        self._resident[upload.key] = stored
        self._resident_bytes += len(stored.data)
        return stored

    def abort(self, upload: Upload) -> None:
        """Gives reserved memory back. Does nothing once the upload has ended."""
        if upload in self._uploads:
            self._uploads.remove(upload)
            self._held_bytes -= len(upload.data)

    def touch(self, key: ObjectKey) -> StoredObject | None:
        """The resident object, now most recently used; its bytes may only be read while it is open."""
        stored = self._resident.get(key)
        if stored is not None:
            self._resident.move_to_end(key)
        return stored

    def open(self, key: ObjectKey) -> StoredObject | None:
        """Like `touch`, and keeps the object's bytes until `close`."""
        stored = self.touch(key)
        if stored is not None:
            stored.num_readers += 1
            self._num_readers += 1
        return stored

    def close(self, stored: StoredObject) -> None:
        """Ends one `open`. The last reader of a leaving object frees its bytes."""
        assert stored.num_readers > 0
        stored.num_readers -= 1
        self._num_readers -= 1
        if stored.num_readers == 0 and stored in self._leaving:
            self._leaving.remove(stored)
            self._held_bytes -= len(stored.data)

    def delete(self, key: ObjectKey) -> int | None:
        """Makes an object unfindable at once and returns its size; None when it is not here. Readers finish."""
        stored = self._resident.get(key)
        if stored is None:
            return None
        self._remove(stored)
        return len(stored.data)

    def discard(self, stored: StoredObject) -> bool:
        """Deletes this very object, not a later one under the same key. False when it is no longer resident."""
        if self._resident.get(stored.record.key) is not stored:
            return False
        self._remove(stored)
        return True

    def _victims(self, size_bytes: int, is_pinned: Callable[[ObjectKey], bool]) -> list[ObjectKey]:
        missing = self._held_bytes + size_bytes - self.budget_bytes
        if size_bytes > self.budget_bytes:
            raise _no_room(size_bytes, self.budget_bytes, f"the budget is {self.budget_bytes}", retry_after_ms=0)
        victims: list[ObjectKey] = []
        for key, stored in self._resident.items():
            if missing <= 0:
                break
            if stored.num_readers == 0 and not is_pinned(key):
                victims.append(key)
                missing -= len(stored.data)
        if missing > 0:
            reason = f"{missing} more are pinned or in transfer"
            raise _no_room(size_bytes, self.budget_bytes, reason, retry_after_ms=RETRY_AFTER_MS)
        return victims

    def _remove(self, stored: StoredObject) -> None:
        del self._resident[stored.record.key]
        self._resident_bytes -= len(stored.data)
        if stored.num_readers:
            self._leaving.add(stored)
        else:
            self._held_bytes -= len(stored.data)

    def check_invariants(self) -> None:
        """Asserts that every byte is counted once and no reader is forgotten. For tests."""
        everything = [*self._resident.values(), *self._leaving]
        assert self._held_bytes == sum(len(o.data) for o in everything) + sum(len(u.data) for u in self._uploads)
        assert self._resident_bytes == sum(len(stored.data) for stored in self._resident.values())
        assert 0 <= self._held_bytes <= self.budget_bytes
        assert all(stored.num_readers > 0 for stored in self._leaving)
        assert self._num_readers == sum(stored.num_readers for stored in everything)
        assert all(key == stored.record.key for key, stored in self._resident.items())
        assert not self._leaving & set(self._resident.values())
        assert all(upload.num_received <= len(upload.data) for upload in self._uploads)


def _no_room(size_bytes: int, budget_bytes: int, reason: str, *, retry_after_ms: int) -> Busy:
    return Busy(
        f"no room for {size_bytes} bytes: {reason}",
        field="info.size_bytes",
        limit=f"{budget_bytes} bytes",
        actual=f"{size_bytes} bytes",
        retry_after_ms=retry_after_ms,
    )
