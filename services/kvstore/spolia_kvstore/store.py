"""Decides for the whole store: the RAM tier, its index, claims and pins move together here, and nowhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import count

from spolia_core.errors import AlreadyStored, DataCorrupt
from spolia_core.reuse import MissReason
from spolia_kvstore.claims import Claims
from spolia_kvstore.index import SqliteIndex
from spolia_kvstore.object_store import ObjectStore, StoredObject, Upload
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.pins import Pins
from spolia_kvstore.verify import check_complete, check_frame, check_object, check_record
from spolia_node.logs import get_log

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class Reader:
    """What a reader can use. Empty codecs or fingerprint mean any."""

    accepted_codecs: frozenset[str] = frozenset()
    fingerprint: bytes = b""

    def refuses(self, record: ObjectRecord) -> MissReason | None:
        """Why this object is of no use to the reader; None when it is."""
        if self.fingerprint and self.fingerprint != record.fingerprint:
            return MissReason.FINGERPRINT
        if self.accepted_codecs and record.codec not in self.accepted_codecs:
            return MissReason.CODEC
        return None


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one chunk: its record and tier, or why it is missed and who computes it now."""

    record: ObjectRecord | None = None
    tier: Tier | None = None
    miss: MissReason | None = None
    claimed_by: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """One item of a Get: an open object, or None with the miss in `entry`."""

    entry: Entry
    stored: StoredObject | None


class ClaimState(IntEnum):
    """What became of a claim. Values equal the protos' enum numbers."""

    GRANTED = 1
    """The caller computes it."""
    HELD = 2
    """Another computes it."""
    STORED = 3
    """It is here."""


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """One result; `owner` and `ttl_s` describe the claim that stands, if one does."""

    state: ClaimState
    owner: str = ""
    ttl_s: float = 0.0


@dataclass(slots=True)
class Counters:
    """Counts since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    digest_failures: int = 0
    puts: int = 0


class KVStore:
    """Chunk objects of all tenants. Used from one event loop; `clock` is monotonic, `wall_clock` dates index rows."""

    def __init__(
        self,
        objects: ObjectStore,
        index: SqliteIndex,
        *,
        name: str,
        max_object_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.objects = objects
        self.index = index
        self.claims = Claims(clock)
        self.pins = Pins()
        self.counters = Counters()
        self._name = name
        self._replica_numbers = count(1)
        self._max_object_bytes = max_object_bytes
        self._clock = clock
        self._wall_clock = wall_clock

    def lookup(self, keys: Sequence[ObjectKey], reader: Reader) -> list[Entry]:
        """One entry per key. Makes what is found recently used; changes nothing else."""
        rows = self.index.lookup(keys[0].tenant_id, [key.chunk_id for key in keys]) if keys else {}
        entries = []
        for key in keys:
            row = rows.get(key.chunk_id)
            if row is None or self.objects.touch(key) is None:
                entries.append(self._missed(key))
            else:
                entries.append(_judged(row.record, reader))
        return entries

    @contextmanager
    def reading(self, keys: Sequence[ObjectKey], reader: Reader) -> Iterator[list[Reading]]:
        """Opens what is here for `reader`, one item per key, and closes it all at the end. Counts hits and misses."""
        readings: list[Reading] = []
        try:
            for key in keys:
                readings.append(self._open(key, reader))
            found = [key for key, reading in zip(keys, readings, strict=True) if reading.stored is not None]
            self.counters.hits += len(found)
            self.counters.misses += len(keys) - len(found)
            self.index.record_hits(found, self._wall_clock())
            yield readings
        finally:
            for reading in readings:
                if reading.stored is not None:
                    self.objects.close(reading.stored)

    def check_memory(self, stored: StoredObject, frame_index: int) -> None:
        """Drops an object whose bytes changed in memory, so that it can be computed and stored again.

        Its readers go on: the frame's digest no longer matches, so they see a miss.
        """
        if not stored.is_intact(frame_index):
            self.counters.digest_failures += 1
            is_dropped = self.objects.discard(stored)
            if is_dropped:
                self._forget(stored.record.key)
            chunk_id = stored.record.key.chunk_id.hex()
            log.warning("bytes changed in memory", chunk_id=chunk_id, frame=frame_index, dropped=is_dropped)

    def begin_put(self, record: ObjectRecord, claim_owner: str) -> Upload:
        """Checks the announcement and reserves memory; end it with `finish_put` or `abort_put`.

        Raises `InvalidRequest`, `AlreadyStored` (the owner's claim is over then) or `Busy`.
        """
        check_record(record, self._max_object_bytes)
        now = self._clock()
        try:
            upload = self.objects.reserve(record.key, record.size_bytes, lambda key: self.pins.is_pinned(key, now))
        except AlreadyStored:
            self.claims.release(record.key, claim_owner)
            raise
        if upload.evicted:
            self.counters.evictions += len(upload.evicted)
            self.index.remove(upload.evicted, Tier.RAM)
        return upload

    def append_frame(self, upload: Upload, offset: int, data: bytes, frame_digest: bytes) -> None:
        """Checks and keeps the next frame. Raises `InvalidRequest` or `DataCorrupt`."""
        with self._noting_damage(upload.key):
            check_frame(upload, offset, data, frame_digest)
        self.objects.append(upload, data)

    async def finish_put(self, upload: Upload, record: ObjectRecord) -> ObjectRecord:
        """Checks the whole object and lets it be found, under the replica's name that is returned. Ends its claim.

        Raises `InvalidRequest`, `DataCorrupt`, or `AlreadyStored` when another upload of this chunk was faster.
        """
        check_complete(upload)
        with self._noting_damage(record.key):
            frame_digests = await _in_thread_to_the_end(check_object, record, upload.data)
        record = replace(record, replica=f"{self._name}/{next(self._replica_numbers)}")
        self.objects.commit(upload, record, frame_digests)
        try:
            self.index.put(record, Tier.RAM, self._wall_clock())
        except BaseException:
            self.objects.delete(record.key)  # what the index cannot list must not be there
            raise
        self.counters.puts += 1
        self.claims.end(record.key)
        return record

    def abort_put(self, upload: Upload) -> None:
        """Frees an upload that did not finish. Does nothing after `finish_put`."""
        self.objects.abort(upload)

    async def claim(self, keys: Sequence[ObjectKey], owner: str, ttl_s: float, wait_s: float) -> list[ClaimResult]:
        """Claims what is neither stored nor held by another; renews what `owner` holds.

        Waits up to `wait_s` for the first of the held keys to change, unless something new was granted: that work can
        begin at once. Raises `Unavailable` when the store goes away meanwhile.
        """
        until = self._clock() + wait_s
        mine = {key for key in keys if (claim := self.claims.holder(key)) is not None and claim.owner == owner}
        results = self._claim_now(keys, owner, ttl_s)
        held = _in_state(keys, results, ClaimState.HELD)
        is_news = bool(_in_state(keys, results, ClaimState.GRANTED) - mine)
        while held and not is_news and self._clock() < until:
            await self.claims.wait_change(held, until)
            results = self._claim_now(keys, owner, ttl_s)
            is_news = _in_state(keys, results, ClaimState.HELD) != held
        return results

    def unclaim(self, keys: Sequence[ObjectKey], owner: str) -> int:
        """Gives claims back; others' are left alone. Returns how many ended."""
        return sum(self.claims.release(key, owner) for key in keys)

    def pin(self, keys: Sequence[ObjectKey], owner: str, lease_s: float) -> list[bool]:
        """Pins what is here, or renews the pin; false for what is not here."""
        until = self._clock() + lease_s
        pinned = [self.objects.touch(key) is not None for key in keys]
        for key, is_here in zip(keys, pinned, strict=True):
            if is_here:
                self.pins.pin(key, owner, until)
        return pinned

    def unpin(self, keys: Sequence[ObjectKey], owner: str) -> int:
        """Ends the owner's pins. Returns how many ended."""
        now = self._clock()
        return sum(self.pins.unpin(key, owner, now) for key in keys)

    def release_node(self, node_id: str) -> None:
        """Ends the claims and pins of a node that left the cluster, so that nobody waits for what it will not do.

        A node that is alive after all loses little: what it stores is taken all the same.
        """
        num_claims, num_pins = self.claims.end_of_node(node_id), self.pins.end_of_node(node_id)
        if num_claims or num_pins:
            log.info("released what a node left behind", node=node_id, num_claims=num_claims, num_pins=num_pins)

    def delete(self, keys: Sequence[ObjectKey]) -> list[int]:
        """Drops objects, pinned or not, and returns the sizes of those that were here. Readers finish."""
        sizes = []
        for key in keys:
            size = self.objects.delete(key)
            if size is not None:
                self._forget(key)
                sizes.append(size)
        return sizes

    @property
    def num_pins(self) -> int:
        """Live pins."""
        return self.pins.num_live(self._clock())

    def check_invariants(self) -> None:
        """Asserts that the RAM tier and its index agree. For tests."""
        self.objects.check_invariants()
        totals = self.index.totals(Tier.RAM)
        assert (totals.num_objects, totals.num_bytes) == (len(self.objects), self.objects.resident_bytes)

    def _open(self, key: ObjectKey, reader: Reader) -> Reading:
        stored = self.objects.touch(key)
        if stored is None:
            return Reading(self._missed(key), None)
        entry = _judged(stored.record, reader)
        return Reading(entry, self.objects.open(key) if entry.miss is None else None)

    def _missed(self, key: ObjectKey) -> Entry:
        claim = self.claims.holder(key)
        return Entry(miss=MissReason.NOT_FOUND, claimed_by=claim.owner if claim else "")

    def _claim_now(self, keys: Sequence[ObjectKey], owner: str, ttl_s: float) -> list[ClaimResult]:
        results = []
        for key in keys:
            if key in self.objects:
                results.append(ClaimResult(ClaimState.STORED))
                continue
            claim = self.claims.take(key, owner, ttl_s)
            state = ClaimState.GRANTED if claim.owner == owner else ClaimState.HELD
            results.append(ClaimResult(state, claim.owner, claim.expires_at - self._clock()))
        return results

    def _forget(self, key: ObjectKey) -> None:
        self.pins.drop(key)
        self.index.remove([key], Tier.RAM)

    @contextmanager
    def _noting_damage(self, key: ObjectKey) -> Iterator[None]:
        try:
            yield
        except DataCorrupt as error:
            self.counters.digest_failures += 1
            log.warning("damaged upload refused", chunk_id=key.chunk_id.hex(), error=error.message)
            raise


def _judged(record: ObjectRecord, reader: Reader) -> Entry:
    miss = reader.refuses(record)
    return Entry(record, Tier.RAM) if miss is None else Entry(miss=miss)


def _in_state(keys: Sequence[ObjectKey], results: Sequence[ClaimResult], state: ClaimState) -> set[ObjectKey]:
    return {key for key, result in zip(keys, results, strict=True) if result.state is state}


async def _in_thread_to_the_end(
    work: Callable[[ObjectRecord, bytearray], tuple[bytes, ...]], record: ObjectRecord, data: bytearray
) -> tuple[bytes, ...]:
    """Runs `work` in a thread. A cancelled caller still waits for it, so no thread reads memory given back."""
    running = asyncio.get_running_loop().run_in_executor(None, work, record, data)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
