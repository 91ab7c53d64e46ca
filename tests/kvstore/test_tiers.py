"""Between memory and disk: nothing is lost that the disk could keep, nothing is displaced by what is worth less."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import damage, eventually, key_of, make_chunk
from tier_worlds import ANYONE, CHUNK_BYTES, open_world

from spolia_core.errors import AlreadyStored, Busy
from spolia_core.reuse import ChunkKind, MissReason
from spolia_kvstore.catalog import Totals
from spolia_kvstore.disk_tier import RETRY_AFTER_S
from spolia_kvstore.objects import Tier
from spolia_kvstore.ram_tier import RETRY_AFTER_MS

ONE, TWO, THREE, FOUR = (make_chunk(number) for number in (1, 2, 3, 4))


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space left")


def held_up(write: Callable[..., None], may_go_on: threading.Event) -> Callable[..., None]:
    """A write that waits until it may go on."""

    def wait_and_write(*arguments: object) -> None:
        assert may_go_on.wait(20)
        write(*arguments)

    return wait_and_write


async def test_what_memory_has_no_room_for_goes_to_disk_first(tmp_path: Path) -> None:
    async with open_world(tmp_path, num_in_memory=2) as world:
        await world.put(ONE, TWO, THREE, FOUR)
        assert world.where(ONE, TWO, THREE, FOUR) == ["DISK", "DISK", "RAM", "RAM"]
        assert (world.tiers.counters.evictions, world.tiers.counters.lost) == (2, 0)
        assert world.store.num_objects == 4
        assert [answer[0] for answer in await world.get(ONE, FOUR)] == [Tier.DISK, Tier.RAM]  # type: ignore[index]  # no item is a miss


async def test_a_copy_that_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    async with open_world(tmp_path, num_in_memory=1) as world:
        await world.put(ONE, durable=True)
        await world.put(TWO)
        assert world.where(ONE, TWO) == ["DISK", "RAM"]
        assert world.disk.counters.written_bytes == CHUNK_BYTES


async def test_a_durable_put_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        assert world.where(ONE) == ["RAM+DISK"]
        with pytest.raises(AlreadyStored):
            await world.put(ONE, durable=True)
        assert world.store.num_objects == 1


async def test_a_durable_put_of_what_is_in_memory_writes_it_and_says_that_it_is_stored(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE)
        with pytest.raises(AlreadyStored):
            await world.put(ONE, durable=True)
        assert world.where(ONE) == ["RAM+DISK"]


async def test_a_durable_put_that_the_disk_cannot_take_is_busy_and_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        with monkeypatch.context() as patched, captured_logs():
            patched.setattr(world.disk.files, "write", full_disk)
            for _ in range(2):  # the second finds it in memory
                with pytest.raises(Busy) as caught:
                    await world.put(ONE, durable=True)
                assert caught.value.field == "durability"
        assert world.where(ONE) == ["RAM"]
        assert await world.get(ONE) == [(Tier.RAM, ONE.data)]
        with pytest.raises(AlreadyStored):
            await world.put(ONE, durable=True)
        assert world.where(ONE) == ["RAM+DISK"]


async def test_a_disk_that_fails_holds_no_upload_up_and_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path, num_in_memory=1) as world:
        monkeypatch.setattr(world.disk.files, "write", full_disk)
        with captured_logs():
            await world.put(ONE, TWO, THREE)
        assert world.where(ONE, TWO, THREE) == ["", "", "RAM"]
        assert (world.tiers.counters.lost, world.disk.counters.write_errors) == (2, 1)
        monkeypatch.undo()
        world.disk._failed_at -= RETRY_AFTER_S
        await world.put(FOUR)
        assert world.where(THREE, FOUR) == ["DISK", "RAM"]


async def test_what_would_not_be_admitted_on_disk_is_not_written(tmp_path: Path) -> None:
    dear = [make_chunk(number, compute_s=100.0) for number in (11, 12)]
    cheap = [make_chunk(number, compute_s=0.001) for number in (13, 14, 15)]
    async with open_world(tmp_path, num_in_memory=2, num_on_disk=2) as world:
        await world.put_on_disk_only(*dear)
        await world.put(*cheap)
        assert world.where(*dear, *cheap) == ["DISK", "DISK", "", "RAM", "RAM"]


async def test_an_upload_waits_for_room_that_the_disk_is_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    async with open_world(tmp_path, num_in_memory=1) as world:
        await world.put(ONE)
        monkeypatch.setattr(world.disk.files, "write", held_up(world.disk.files.write, may_go_on))
        waiting = [asyncio.create_task(world.put(chunk)) for chunk in (TWO, THREE)]
        await eventually(lambda: bool(world.tiers.writes.num_under_way))
        assert not any(task.done() for task in waiting)
        may_go_on.set()
        done, _ = await asyncio.wait(waiting, timeout=20)
        assert len(done) == 2
        assert world.where(ONE) == ["DISK"]


async def test_an_upload_does_not_wait_for_a_slow_disk_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spolia_kvstore.tiers.MAX_ROOM_WAIT_S", 0.05)
    may_go_on = threading.Event()
    async with open_world(tmp_path, num_in_memory=1) as world:
        await world.put(ONE)
        monkeypatch.setattr(world.disk.files, "write", held_up(world.disk.files.write, may_go_on))
        with pytest.raises(Busy) as caught:
            await world.put(TWO)
        assert caught.value.retry_after_ms == RETRY_AFTER_MS
        may_go_on.set()
        await world.tiers.writes.all_ended()
        assert world.where(ONE) == ["RAM+DISK"]


async def test_a_pin_that_comes_while_an_upload_waits_for_room_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    async with open_world(tmp_path, num_in_memory=2) as world:
        large = make_chunk(9, num_tokens=16)
        await world.put(ONE, TWO)
        await world.store.delete([key_of(TWO)])
        await world.put(TWO, durable=True)
        monkeypatch.setattr(world.disk.files, "write", held_up(world.disk.files.write, may_go_on))
        upload = asyncio.create_task(world.put(large))  # takes both: one is on disk, the other is written first
        await eventually(lambda: bool(world.tiers.writes.num_under_way))
        kept = [key for key in (key_of(ONE), key_of(TWO)) if key in world.ram]
        assert world.store.pin(kept, "me", 60.0) == [True] * len(kept)
        may_go_on.set()
        await asyncio.wait([upload], timeout=20)
        assert all(key in world.ram for key in kept)
        assert isinstance(upload.exception(), Busy)


async def test_what_is_read_from_disk_is_found_in_memory_next_time(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE)
        assert await world.get(ONE) == [(Tier.DISK, ONE.data)]
        assert world.where(ONE) == ["RAM+DISK"]
        assert await world.get(ONE) == [(Tier.RAM, ONE.data)]
        assert world.store.tenants.held() == {"tenant": Totals(1, CHUNK_BYTES)}


async def test_a_read_displaces_from_memory_only_what_is_worth_less(tmp_path: Path) -> None:
    dear = make_chunk(11, compute_s=100.0)
    async with open_world(tmp_path, num_in_memory=1) as world:
        await world.put_on_disk_only(ONE, THREE)
        await world.put(dear, durable=True)
        world.clock.now += 10.0
        assert await world.get(ONE) == [(Tier.DISK, ONE.data)]
        assert world.where(ONE, dear) == ["DISK", "RAM+DISK"]
    async with open_world(tmp_path, num_in_memory=1, clock=world.clock) as world:
        await world.put(TWO, durable=True)
        world.clock.now += 10.0
        assert await world.get(THREE) == [(Tier.DISK, THREE.data)]
        assert world.where(THREE, TWO) == ["RAM+DISK", "DISK"], "the use that this read is counts too"


async def test_a_read_that_ends_early_leaves_memory_as_it_was(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE)
        async with world.store.reading([key_of(ONE)], ANYONE) as (reading,):
            await world.store.begin(reading)
            async for _ in reading.frames():
                break
            assert world.tiers.num_transfers == 2, "the hold on the file, and the memory it is copied to"
        assert (world.where(ONE), world.ram.held_bytes, world.tiers.num_transfers) == (["DISK"], 0, 0)


async def test_an_object_deleted_while_it_is_promoted_does_not_come_back(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE)
        async with world.store.reading([key_of(ONE)], ANYONE) as (reading,):
            await world.store.begin(reading)
            async for frame in reading.frames():
                await world.store.delete([key_of(ONE)])
                assert b"".join(frame.pieces) == ONE.data
        assert (world.where(ONE), world.ram.held_bytes, world.store.num_objects) == ([""], 0, 0)


async def test_an_object_replaced_while_it_is_promoted_is_not_mixed_up_with_the_new_one(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE)
        async with world.store.reading([key_of(ONE)], ANYONE) as (reading,):
            await world.store.begin(reading)
            async for _ in reading.frames():
                await world.store.delete([key_of(ONE)])
                await world.put_on_disk_only(ONE)
        assert world.where(ONE) == ["DISK"]


async def test_an_object_deleted_while_it_is_written_leaves_nothing_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    async with open_world(tmp_path) as world:
        monkeypatch.setattr(world.disk.files, "write", held_up(world.disk.files.write, may_go_on))
        upload = await world.filled(ONE, durable=True)
        putting = asyncio.create_task(world.store.puts.finish(upload, durable=True))
        await eventually(lambda: bool(world.disk._writing))
        deleting = asyncio.create_task(world.store.delete([key_of(ONE)]))
        await asyncio.sleep(0.01)
        may_go_on.set()
        assert (await deleting).objects == Totals(1, CHUNK_BYTES)
        with pytest.raises(Busy):
            await putting
        assert (world.where(ONE), list(world.disk.files.scan())) == ([""], [])
        assert world.tiers.writes._refused_at == {}, "what is gone is not remembered"


async def test_an_object_put_again_while_its_damaged_predecessor_is_written_reaches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    async with open_world(tmp_path) as world:
        await world.put(ONE)
        old = world.ram.find(key_of(ONE))
        assert old is not None
        monkeypatch.setattr(world.disk.files, "write", held_up(world.disk.files.write, may_go_on))
        writing = world.tiers.writes.write(old)
        await eventually(lambda: bool(world.disk._writing))
        world.tiers.discard(old)
        putting = asyncio.create_task(world.put(ONE, durable=True))
        await eventually(lambda: len(world.disk._writing) == 2)
        may_go_on.set()
        (record,) = await putting
        assert not await writing
        world.drop_from_memory(key_of(ONE))
        (row,) = world.disk.rows.find([key_of(ONE)]).values()
        assert row.record == record
        assert await world.get(ONE) == [(Tier.DISK, ONE.data)]


async def test_damage_in_memory_is_healed_from_disk_and_damage_on_disk_is_a_miss(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        stored = world.ram.find(key_of(ONE))
        assert stored is not None
        damage(stored, 700)
        with captured_logs():
            await world.get(ONE)
            assert world.where(ONE) == ["DISK"]
            assert await world.get(ONE) == [(Tier.DISK, ONE.data)]
            world.drop_from_memory(key_of(ONE))
            world.file_of(ONE).write_bytes(ONE.data[:-1] + b"?")
            assert (await world.get(ONE))[0] != (Tier.DISK, ONE.data)
            assert await world.get(ONE) == [MissReason.NOT_FOUND]
        assert (world.store.counters.digest_failures, world.disk.counters.quarantined) == (2, 1)
        assert world.store.num_objects == 0
        await world.put(ONE, durable=True)


async def test_a_file_that_cannot_be_read_is_a_miss_before_anything_is_promised(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE, TWO)
        world.file_of(ONE).unlink()
        with captured_logs():
            assert await world.get(ONE, TWO) == [MissReason.UNREADABLE, (Tier.DISK, TWO.data)]
        assert world.store.counters.misses[MissReason.UNREADABLE] == 1


async def test_at_the_end_all_that_only_memory_holds_is_written_the_most_valuable_first(tmp_path: Path) -> None:
    async with open_world(tmp_path, num_on_disk=2) as world:
        await world.put(ONE, TWO, THREE)
        await world.tiers.writes.write_all()
        assert world.where(ONE, TWO, THREE) == ["RAM", "RAM+DISK", "RAM+DISK"]


async def test_the_deeper_prefix_chunk_goes_first_among_equals() -> None:
    shallow, deep = (make_chunk(n, kind=ChunkKind.PREFIX, rope_base=128 * n) for n in (1, 2))
    async with open_world(num_in_memory=2) as world:
        for chunk in (shallow, deep):
            await world.store.puts.finish(await world.filled(chunk))
        ranks = [world.ram.rank_of(stored) for stored in world.ram]
        assert ranks[0] > ranks[1]


async def test_what_is_new_is_written_behind_after_a_while_and_not_sooner(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        world.tiers.writes.is_behind = True
        old, deleted, new = (make_chunk(number) for number in range(3))
        await world.put(old, deleted)
        await world.store.delete([key_of(deleted)])
        world.clock.now += 10.0
        await world.put(new)
        await world.tiers.writes.write_behind(5.0)
        assert world.where(old, deleted, new) == ["RAM+DISK", "", "RAM"]
        world.clock.now += 5.0
        await world.tiers.writes.write_behind(5.0)
        assert world.where(old, deleted, new) == ["RAM+DISK", "", "RAM+DISK"]
        assert not world.tiers.writes._waiting


async def test_what_a_failing_disk_could_not_take_is_written_behind_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        world.tiers.writes.is_behind = True
        await world.put(ONE, TWO, THREE)
        await world.store.delete([key_of(THREE)])
        world.clock.now += 10.0
        with monkeypatch.context() as patched, captured_logs():
            patched.setattr(world.disk.files, "write", full_disk)
            for _ in range(3):
                await world.tiers.writes.write_behind(5.0)
        assert world.where(ONE, TWO) == ["RAM", "RAM"]
        assert world.disk.counters.write_errors == 1, "one asks whether the disk is well, the others wait"
        await world.tiers.writes.write_behind(5.0)
        assert world.where(ONE, TWO) == ["RAM", "RAM"], "it is left alone for a while"
        world.disk._failed_at -= RETRY_AFTER_S
        await world.tiers.writes.write_behind(5.0)
        assert world.where(ONE, TWO) == ["RAM", "RAM+DISK"], "what it refused last has its turn last"
        monkeypatch.setattr("spolia_kvstore.write_back.RETRY_AFTER_S", 0.0)
        await world.tiers.writes.write_behind(5.0)
        assert world.where(ONE, TWO, THREE) == ["RAM+DISK", "RAM+DISK", ""]
        assert not world.tiers.writes._waiting


async def test_what_is_not_worth_its_place_on_disk_is_not_waited_with(tmp_path: Path) -> None:
    dear, cheap = make_chunk(11, compute_s=100.0), make_chunk(12, compute_s=0.001)
    async with open_world(tmp_path, num_on_disk=1) as world:
        world.tiers.writes.is_behind = True
        await world.put_on_disk_only(dear)
        await world.put(cheap)
        world.clock.now += 10.0
        await world.tiers.writes.write_behind(5.0)
        assert world.where(dear, cheap) == ["DISK", "RAM"]
        assert not world.tiers.writes._waiting


async def test_a_durable_put_that_loses_to_one_in_memory_makes_that_one_durable(tmp_path: Path) -> None:
    """At every step where it can lose: what ALREADY_EXISTS says of durability must be true."""
    async with open_world(tmp_path) as world:
        early, late = make_chunk(1), make_chunk(2)
        await world.put(early)
        with pytest.raises(AlreadyStored):
            await world.filled(early, durable=True)
        upload = await world.filled(late, durable=True)
        await world.put(late)
        with pytest.raises(AlreadyStored):
            await world.store.puts.finish(upload, durable=True)
        assert world.where(early, late) == ["RAM+DISK", "RAM+DISK"]
