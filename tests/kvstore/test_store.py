"""The store's decisions, without gRPC: tier, claims and pins move together."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import TENANT, announced, damage, eventually, key_of, make_chunk
from tier_worlds import ANYONE, CHUNK_BYTES, World, open_world

from spolia_core.errors import AlreadyStored, Busy, DataCorrupt, InvalidRequest, NotSupported
from spolia_core.reuse import MissReason
from spolia_kvstore.catalog import Totals
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.store import ClaimResult, ClaimState

CHUNK, OTHER, THIRD = (make_chunk(number) for number in (1, 2, 3))
KEY = key_of(CHUNK)


async def misses(world: World, *keys: ObjectKey) -> list[MissReason | None]:
    return [entry.miss for entry in await world.store.lookup(keys, ANYONE)]


async def claim(world: World, key: ObjectKey, owner: str) -> ClaimResult:
    (result,) = await world.store.claim([key], owner, 30.0, 0.0)
    return result


async def test_a_lookup_makes_recent() -> None:
    async with open_world(num_in_memory=2) as world:
        await world.put(CHUNK, OTHER)
        world.clock.now += 10.0
        await world.store.lookup([KEY], ANYONE)
        await world.put(THIRD)
        assert world.where(CHUNK, OTHER, THIRD) == ["RAM", "", "RAM"]
        assert (world.tiers.counters.evictions, world.tiers.counters.lost) == (1, 1)


async def test_a_pin_keeps_an_object_for_its_lease_only_and_not_from_delete() -> None:
    async with open_world(num_in_memory=1) as world:
        await world.put(CHUNK)
        assert world.store.pin([KEY, key_of(OTHER)], "me", lease_s=60.0) == [True, False]
        with pytest.raises(Busy, match="pinned"):
            await world.filled(OTHER)
        assert world.store.pins.of(KEY) == [("me", 60.0)]
        world.clock.now += 60.0
        await world.put(OTHER)
        assert world.where(CHUNK, OTHER) == ["", "RAM"]
        world.store.pin([key_of(OTHER)], "me", lease_s=60.0)
        dropped = await world.store.delete([key_of(OTHER)] * 2)
        assert dropped.objects == dropped.tiers[Tier.RAM] == Totals(1, CHUNK_BYTES)
        assert (world.store.pins.num_live, world.store.num_objects) == (0, 0)


async def test_only_live_pins_of_the_owner_are_ended() -> None:
    async with open_world() as world:
        await world.put(CHUNK, OTHER)
        keys = [KEY, key_of(OTHER)]
        world.store.pin(keys, "me", 10.0)
        world.store.pin([KEY], "other", 60.0)
        assert world.store.unpin([KEY, KEY], "me") == 1
        world.clock.now += 10.0
        assert (world.store.unpin(keys, "me"), world.store.pins.num_live) == (0, 1)


async def test_every_replica_has_a_name_of_its_own_also_across_restarts() -> None:
    names = set()
    for _ in range(2):
        async with open_world() as world:
            for _ in range(2):
                names |= {record.replica for record in await world.put(CHUNK)}
                await world.store.delete([KEY])
    assert len(names) == 4
    assert all(name.startswith("node/") for name in names)


async def test_a_put_ends_every_claim_on_its_object_and_no_other() -> None:
    async with open_world() as world:
        upload = await world.filled(CHUNK)
        await claim(world, KEY, "late")
        await claim(world, key_of(CHUNK, "other"), "late")
        await world.store.puts.finish(upload)
        assert world.store.claims.num_live() == 1
        assert (await claim(world, KEY, "late")).state is ClaimState.STORED


async def test_a_put_that_was_not_needed_ends_its_owners_claim() -> None:
    async with open_world() as world:
        await world.put(CHUNK)
        await world.store.claims.take([KEY], "late", 60.0, ())
        with pytest.raises(AlreadyStored):
            await world.filled(CHUNK, owner="late")
        assert world.store.claims.num_live() == 0


async def test_of_two_uploads_the_second_is_told_and_frees_its_bytes() -> None:
    async with open_world() as world:
        uploads = [await world.filled(CHUNK) for _ in range(2)]
        await world.store.puts.finish(uploads[1])
        with pytest.raises(AlreadyStored):
            await world.store.puts.finish(uploads[0])
        assert (world.ram.held_bytes, world.store.counters.puts) == (CHUNK_BYTES, 1)


async def test_a_claim_lapses_into_the_hands_of_the_next_who_asks() -> None:
    async with open_world() as world:
        assert [(await claim(world, KEY, owner)).state for owner in ("a", "a", "b")] == [
            ClaimState.GRANTED,
            ClaimState.GRANTED,
            ClaimState.HELD,
        ]
        assert await misses(world, KEY) == [MissReason.NOT_FOUND]
        assert [entry.claimed_by for entry in await world.store.lookup([KEY], ANYONE)] == ["a"]
        world.clock.now += 30.0
        assert await claim(world, KEY, "b") == ClaimResult(ClaimState.GRANTED, "b", 30.0)


async def test_a_damaged_upload_is_refused_and_leaves_nothing_but_a_count() -> None:
    damaged = CHUNK.data[:-1] + bytes([CHUNK.data[-1] ^ 1])
    async with open_world() as world:
        upload = await world.store.puts.begin(announced(CHUNK), "")
        world.ram.append(upload, damaged)
        with pytest.raises(DataCorrupt), captured_logs():
            await world.store.puts.finish(upload)
        world.store.puts.abort(upload)
        assert (world.ram.held_bytes, world.store.num_objects) == (0, 0)
        assert (world.store.counters.digest_failures, world.store.counters.puts) == (1, 0)


async def test_an_upload_that_ended_early_is_refused() -> None:
    async with open_world() as world:
        upload = await world.store.puts.begin(announced(CHUNK), "")
        with pytest.raises(InvalidRequest, match="as announced"):
            await world.store.puts.finish(upload)
        world.store.puts.abort(upload)


async def test_a_store_without_a_disk_refuses_what_must_be_on_one() -> None:
    async with open_world() as world:
        with pytest.raises(NotSupported) as caught:
            await world.put(CHUNK, durable=True)
        assert caught.value.field == "durability"


async def test_reads_count_hits_and_misses_and_close_what_they_opened() -> None:
    async with open_world() as world:
        await world.put(CHUNK)
        world.clock.now += 10.0

        async def read_and_fail() -> None:
            async with world.store.reading([KEY, key_of(OTHER), KEY], ANYONE) as readings:
                entries = [await world.store.begin(reading) for reading in readings]
                assert [entry.tier for entry in entries] == [Tier.RAM, None, Tier.RAM]
                assert world.tiers.num_transfers == 2
                raise RuntimeError("the reader failed")

        with pytest.raises(RuntimeError, match="the reader failed"):
            await read_and_fail()
        assert world.tiers.num_transfers == 0
        counters = world.store.counters
        assert (counters.hits[Tier.RAM], counters.misses[MissReason.NOT_FOUND]) == (2, 1)
        assert counters.read_bytes[Tier.RAM] == 2 * CHUNK_BYTES
        stored = world.ram.find(KEY)
        assert stored is not None
        assert (stored.usage.hits, stored.usage.used_at) == (2, world.clock.now)


async def test_bytes_that_rot_in_memory_are_dropped_and_can_be_stored_again() -> None:
    async with open_world() as world:
        await world.put(CHUNK)
        stored = world.ram.find(KEY)
        assert stored is not None
        damage(stored, -1)
        with captured_logs():
            ((_, data),) = await world.get(CHUNK)  # type: ignore[misc]  # it is no miss
        assert data != CHUNK.data
        assert (world.store.counters.digest_failures, world.store.num_objects) == (1, 0)
        await world.put(CHUNK)
        assert await world.get(CHUNK) == [(Tier.RAM, CHUNK.data)]


async def test_what_a_node_left_behind_is_released() -> None:
    async with open_world() as world:
        await world.put(CHUNK)
        for owner in ("node-1/a", "node-10/a"):
            world.store.pin([KEY], owner, 60.0)
        await claim(world, key_of(OTHER), "node-1/a")
        await world.store.release_node("node-1")
        assert world.store.pins.of(KEY) == [("node-10/a", 60.0)]
        assert world.store.claims.num_live() == 0


async def test_an_object_put_again_while_its_delete_is_under_way_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = asyncio.Event()

    async def slow_sync() -> bool:
        return await may_end.wait()

    async with open_world(tmp_path) as world:
        await world.put(CHUNK, durable=True)
        world.store.pin([KEY], "me", 60.0)
        monkeypatch.setattr(world.disk, "sync", slow_sync)
        deleting = asyncio.create_task(world.store.delete([KEY]))
        await eventually(lambda: world.where(CHUNK) == [""])
        assert (world.store.tenants.held(), world.store.pins.num_live) == ({}, 0)
        await world.put(CHUNK)
        may_end.set()
        await deleting
        assert world.store.tenants.held() == {TENANT: Totals(1, CHUNK_BYTES)}
        await world.store.delete([KEY])
        assert world.store.tenants.held() == {}


async def test_an_index_that_fails_for_a_while_leaves_the_counts_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async with open_world(tmp_path) as world:
        await world.put(CHUNK, OTHER, durable=True)
        world.store.pin([KEY], "me", 60.0)
        with monkeypatch.context() as patched, captured_logs():
            catalog = world.catalog
            for table, method in (
                (catalog, "lookup"),
                (catalog, "set_usage"),
                (catalog.pins, "put"),
                (catalog.pins, "remove"),
            ):
                patched.setattr(table, method, fail)
            world.drop_from_memory(KEY)
            assert await world.get(CHUNK, OTHER) == [MissReason.NOT_FOUND, (Tier.RAM, OTHER.data)]
            world.store.pin([key_of(OTHER)], "me", 60.0)
            await world.store.sweep()
        assert world.store.pins.of(KEY) == [("me", 60.0)], "it is still there"
        assert await world.get(CHUNK) == [(Tier.DISK, CHUNK.data)]
        assert (await world.store.delete([KEY, key_of(OTHER)])).objects == Totals(2, 2 * CHUNK_BYTES)
        assert world.store.tenants.held() == {}


async def test_a_sweep_forgets_pins_that_ran_out_here_and_in_the_catalog(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(CHUNK, durable=True)
        world.store.pin([KEY], "me", 10.0)
        assert [lease.owner for lease in world.catalog.pins.standing(world.clock.now)] == ["me"]
        world.clock.now += 10.0
        await world.store.sweep()
        assert world.catalog.pins.standing(0.0) == []
        assert world.store.tenants.held() == {TENANT: Totals(1, CHUNK_BYTES)}


async def test_what_was_deleted_can_be_claimed_though_the_index_keeps_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(CHUNK)
        with monkeypatch.context() as patched, captured_logs():
            patched.setattr(world.catalog, "remove", refuse)
            await world.store.delete([KEY])
            assert (await claim(world, KEY, "me")).state is ClaimState.GRANTED
        world.disk.rows.flush()
