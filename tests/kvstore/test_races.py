"""Calls that cross each other, or are cut off in the middle: what was promised holds, and nothing stays behind."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from kvstore_worlds import TENANT, HandClock, eventually, key_of, make_chunk
from tier_worlds import ANYONE, CHUNK_BYTES, open_world

from spolia_core.errors import AlreadyStored, Busy
from spolia_kvstore.backend import ClaimLease
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.object_file import ObjectFile
from spolia_kvstore.quotas import Quota
from spolia_kvstore.write_back import MAX_WRITES

CHUNK = make_chunk(1)
KEY = key_of(CHUNK)


async def test_an_upload_that_ends_second_leaves_what_the_first_was_promised(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        first = await world.filled(CHUNK, durable=True)
        second = await world.filled(CHUNK)
        await world.store.puts.finish(first, durable=True)
        world.store.pin([KEY], "me", 60.0)
        with pytest.raises(AlreadyStored):
            await world.store.puts.finish(second)
        assert world.where(CHUNK) == ["RAM+DISK"]
        assert world.store.pins.of(KEY) == [("me", 60.0)]


async def test_an_upload_begun_before_another_went_to_disk_only_loses_too(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        late = await world.filled(CHUNK)
        await world.put(CHUNK, durable=True)
        world.drop_from_memory(KEY)
        with pytest.raises(AlreadyStored):
            await world.store.puts.finish(late)
        assert world.where(CHUNK) == ["DISK"]


async def test_uploads_at_once_keep_to_the_quota_together(tmp_path: Path) -> None:
    async with open_world(tmp_path, default_quota=Quota(num_objects=2)) as world:
        uploads = [await world.filled(make_chunk(number)) for number in range(4)]
        for upload in uploads:
            await world.store.puts.finish(upload)
        assert world.store.tenants.held()[TENANT].num_objects == 2


async def test_a_read_cut_off_while_the_disk_hangs_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the call is cancelled: gRPC's cancel and the deadline's may come together."""
    may_go_on = threading.Event()
    read = ObjectFile.read
    closed: list[ObjectFile] = []
    close = ObjectFile.close

    def slow(file: ObjectFile, start: int, end: int) -> bytes:
        assert may_go_on.wait(20)
        return read(file, start, end)

    def noted(file: ObjectFile) -> None:
        closed.append(file)
        close(file)

    monkeypatch.setattr(ObjectFile, "read", slow)
    monkeypatch.setattr(ObjectFile, "close", noted)
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(CHUNK)

        async def get() -> None:
            async with world.store.reading([KEY, KEY], ANYONE) as readings:
                for reading in readings:
                    await world.store.begin(reading)

        task = asyncio.create_task(get())
        await asyncio.sleep(0.05)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task], timeout=20)
        assert world.tiers.num_transfers == 0
        assert not closed, "a thread still reads it"
        may_go_on.set()
        await eventually(lambda: len(closed) == 1)


async def test_a_file_opened_for_nobody_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()
    num_open = 0

    class Slow(ObjectFile):
        def __init__(self, path: Path, size: int) -> None:
            nonlocal num_open
            assert may_go_on.wait(20)
            super().__init__(path, size)
            num_open += 1

        def close(self) -> None:
            nonlocal num_open
            num_open -= 1
            super().close()

    monkeypatch.setattr("spolia_kvstore.disk_tier.ObjectFile", Slow)
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(CHUNK)
        (row,) = world.disk.rows.find([KEY]).values()
        task = asyncio.create_task(world.disk.open(row))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task], timeout=20)
        may_go_on.set()
        await world.disk.in_thread(lambda: None)
        await eventually(lambda: num_open == 0)


async def test_a_put_cut_off_while_it_is_announced_is_announced_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world() as world:
        may_go_on = asyncio.Event()
        announce = world.store.index.announce

        async def slow(record: object) -> bool:
            await may_go_on.wait()
            return await announce(record)  # type: ignore[arg-type]  # the method that it stands for

        monkeypatch.setattr(world.store.index, "announce", slow)
        await world.store.claim([KEY], "me", 60.0, 0.0)
        task = asyncio.create_task(world.store.puts.finish(await world.filled(CHUNK)))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task], timeout=20)
        assert task.cancelled()
        may_go_on.set()
        await eventually(lambda: world.store.claims.num_live() == 0)


async def test_room_for_a_large_object_is_made_of_many_small_ones_a_few_writes_at_a_time(tmp_path: Path) -> None:
    async with open_world(tmp_path, num_in_memory=40, num_on_disk=100) as world:
        small = [make_chunk(number) for number in range(40)]
        await world.put(*small)
        large = make_chunk(99, num_tokens=160)
        most = 0
        task = asyncio.create_task(world.filled(large))
        while not task.done():
            most = max(most, world.tiers.writes.num_under_way)
            await asyncio.sleep(0)
        world.store.puts.abort(await task)
        assert 0 < most <= MAX_WRITES
        gone = [chunk for chunk in small if key_of(chunk) not in world.ram]
        assert len(gone) * CHUNK_BYTES >= len(large.data) - CHUNK_BYTES
        assert set(world.where(*gone)) == {"DISK"}, "none was lost for it"


async def test_what_may_not_go_is_not_begun_with() -> None:
    async with open_world(num_in_memory=4) as world:
        chunks = [make_chunk(number) for number in range(4)]
        await world.put(*chunks)
        world.store.pin([key_of(chunk) for chunk in chunks[2:]], "me", 60.0)
        with pytest.raises(Busy):
            await world.filled(make_chunk(9, num_tokens=32))
        assert world.where(*chunks) == ["RAM"] * 4


async def test_leases_run_out_in_time_although_the_wall_clock_is_set_back() -> None:
    clock, wall = HandClock(), HandClock()
    wall.now = 10_000.0
    backend = EmbeddedBackend(Catalog(), clock, wall)
    await backend.claim([KEY], "a", 30.0, ())
    await backend.renew_member("node", 1, b"record", 30.0)
    wall.now -= 7200.0
    clock.now += 29.0
    assert await backend.claims([KEY]) == [ClaimLease("a", 1.0)]
    clock.now += 1.0
    assert await backend.claims([KEY]) == [None]
    assert await backend.members() == []
