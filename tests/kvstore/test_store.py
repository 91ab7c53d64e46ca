"""The store's decisions, without gRPC: tier, index, claims and pins move together."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence

import pytest
from kvstore_worlds import TENANT, Chunk, HandClock, make_chunk

from spolia.v1.kvstore_pb2 import PutHeader
from spolia_core.digests import frames
from spolia_core.errors import AlreadyStored
from spolia_core.reuse import MissReason
from spolia_kvstore import store as store_module
from spolia_kvstore.index import SqliteIndex
from spolia_kvstore.object_store import ObjectStore, Upload
from spolia_kvstore.objects import ObjectKey, ObjectRecord
from spolia_kvstore.store import ClaimState, KVStore, Reader
from spolia_kvstore.verify import check_object
from spolia_kvstore.wire import record_of

CHUNK = make_chunk(1)
KEY = ObjectKey(TENANT, CHUNK.chunk_id)
ANYONE = Reader()


def make_store(num_chunks: int = 4) -> tuple[KVStore, HandClock]:
    """Room for `num_chunks` chunks of the size all tests here use."""
    clock = HandClock()
    objects = ObjectStore(num_chunks * len(CHUNK.data))
    return KVStore(objects, SqliteIndex(), name="node", max_object_bytes=1 << 20, clock=clock), clock


def announced(chunk: Chunk) -> ObjectRecord:
    return record_of(PutHeader(tenant_id=TENANT, info=chunk.info))


def filled(store: KVStore, chunk: Chunk, owner: str = "") -> Upload:
    upload = store.begin_put(announced(chunk), owner)
    for offset, piece, piece_digest in frames(chunk.data):
        store.append_frame(upload, offset, piece, piece_digest)
    return upload


async def put(store: KVStore, *chunks: Chunk) -> None:
    for chunk in chunks:
        await store.finish_put(filled(store, chunk), announced(chunk))


def missed(store: KVStore, keys: Sequence[ObjectKey]) -> list[bool]:
    return [entry.miss is MissReason.NOT_FOUND for entry in store.lookup(keys, ANYONE)]


async def test_a_lookup_makes_recent_and_eviction_reaches_the_index() -> None:
    store, _ = make_store(num_chunks=2)
    first, second, third = (make_chunk(number) for number in (1, 2, 3))
    keys = [ObjectKey(TENANT, chunk.chunk_id) for chunk in (first, second, third)]
    await put(store, first, second)
    store.lookup([keys[0]], ANYONE)
    await put(store, third)
    assert missed(store, keys) == [False, True, False]
    assert store.counters.evictions == 1
    store.check_invariants()


async def test_a_pin_keeps_an_object_for_its_lease_only_and_not_from_delete() -> None:
    store, clock = make_store(num_chunks=1)
    await put(store, CHUNK)
    assert store.pin([KEY], "me", lease_s=60.0) == [True]
    with pytest.raises(Exception, match="pinned"):
        filled(store, make_chunk(2))
    clock.now += 60.0
    store.abort_put(filled(store, make_chunk(2)))
    assert missed(store, [KEY]) == [True]
    await put(store, CHUNK)
    store.pin([KEY], "me", lease_s=60.0)
    assert store.delete([KEY, KEY]) == [len(CHUNK.data)]
    assert store.num_pins == 0
    store.check_invariants()


async def test_every_replica_has_a_name_of_its_own() -> None:
    store, _ = make_store()
    names = set()
    for _ in range(3):
        names.add((await store.finish_put(filled(store, CHUNK), announced(CHUNK))).replica)
        store.delete([KEY])
    assert names == {"node/1", "node/2", "node/3"}


async def test_a_put_that_was_not_needed_ends_its_owners_claim() -> None:
    store, _ = make_store()
    upload = filled(store, CHUNK)
    store.claims.take(KEY, "late", 60.0)
    store.claims.take(ObjectKey("other", KEY.chunk_id), "late", 60.0)
    await store.finish_put(upload, announced(CHUNK))
    assert store.claims.num_live() == 1
    store.claims.take(KEY, "late", 60.0)
    with pytest.raises(AlreadyStored):
        store.begin_put(announced(CHUNK), "late")
    assert store.claims.holder(KEY) is None


async def test_a_claim_lapses_into_the_hands_of_the_next_who_asks() -> None:
    store, clock = make_store()
    results = [(await store.claim([KEY], owner, 30.0, 0.0))[0].state for owner in ("a", "a", "b")]
    assert results == [ClaimState.GRANTED, ClaimState.GRANTED, ClaimState.HELD]
    clock.now += 30.0
    (result,) = await store.claim([KEY], "b", 30.0, 0.0)
    assert (result.state, result.owner, result.ttl_s) == (ClaimState.GRANTED, "b", 30.0)


async def test_what_the_index_cannot_list_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = make_store()

    def full_disk(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store.index, "put", full_disk)
    with pytest.raises(sqlite3.OperationalError):
        await put(store, CHUNK)
    assert (store.objects.held_bytes, store.counters.puts) == (0, 0)
    store.check_invariants()


async def test_a_cancelled_put_keeps_its_memory_until_no_thread_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = make_store()
    started, may_end = threading.Event(), threading.Event()

    def slow_check(record: ObjectRecord, data: bytearray) -> tuple[bytes, ...]:
        started.set()
        assert may_end.wait(20)
        return check_object(record, data)

    monkeypatch.setattr(store_module, "check_object", slow_check)
    upload = filled(store, CHUNK)
    task = asyncio.create_task(store.finish_put(upload, announced(CHUNK)))
    assert await asyncio.to_thread(started.wait, 20)
    task.cancel()
    _, pending = await asyncio.wait([task], timeout=0.05)
    assert pending == {task}
    may_end.set()
    await asyncio.wait([task], timeout=20)
    assert task.cancelled()
    store.abort_put(upload)
    assert (store.objects.held_bytes, len(store.objects)) == (0, 0)


async def test_reads_count_hits_and_misses_and_close_what_they_opened() -> None:
    store, _ = make_store()
    await put(store, CHUNK)
    keys = [KEY, ObjectKey(TENANT, bytes(32)), KEY]

    def read_and_fail() -> None:
        with store.reading(keys, ANYONE) as readings:
            assert [reading.stored is not None for reading in readings] == [True, False, True]
            assert store.objects.num_transfers == 2
            raise RuntimeError("the reader failed")

    with pytest.raises(RuntimeError, match="the reader failed"):
        read_and_fail()
    assert store.objects.num_transfers == 0
    assert (store.counters.hits, store.counters.misses) == (2, 1)
    assert store.index.lookup(TENANT, [KEY.chunk_id])[KEY.chunk_id].hits == 2
