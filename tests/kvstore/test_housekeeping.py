"""What operators ask: what is here, whether it is whole, and to throw away what is of no use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import TENANT, damage, key_of, make_chunk
from tier_worlds import CHUNK_BYTES, World, open_world

from spolia_core.reuse import MissReason
from spolia_kvstore.catalog import Totals
from spolia_kvstore.housekeeping import Collected, Damage, Housekeeping, Verified
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.store import Dropped

ONE, TWO, THREE = (make_chunk(number) for number in (1, 2, 3))
FAR = make_chunk(7 << 248)  # its id begins with another byte
NOTHING = Collected()


async def verified(world: World, tenant_id: str = "", keys: Sequence[ObjectKey] = ()) -> Verified:
    with captured_logs():
        *_, last = [progress async for progress in world.admin.verify(tenant_id, keys)]
    return last


async def collected(world: World, *, idle_s: float = 0.0, dry_run: bool = False) -> Collected:
    with captured_logs():
        return await world.admin.collect(drop_unknown=False, idle_s=idle_s, dry_run=dry_run)


def rot(world: World, chunk_key: ObjectKey) -> None:
    stored = world.ram.find(chunk_key)
    assert stored is not None
    damage(stored, 500)


async def test_the_list_has_each_object_once_with_its_tiers_times_hits_and_pins(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE)
        await world.put(TWO, durable=True)
        await world.put(THREE)
        world.clock.now += 10.0
        await world.get(TWO)
        world.store.pin([key_of(THREE)], "me", 60.0)
        listed = {item.record.key: item for item in world.admin.list()}
        assert [listed[key_of(chunk)].tiers for chunk in (ONE, TWO, THREE)] == [
            (Tier.DISK,),
            (Tier.RAM, Tier.DISK),
            (Tier.RAM,),
        ]
        two, three = listed[key_of(TWO)], listed[key_of(THREE)]
        assert (two.age_s, two.idle_s, two.hits, two.pins) == (12.0, 0.0, 1, ())
        assert (three.age_s, three.hits, three.pins) == (10.0, 0, (("me", 60.0),))


async def test_the_list_can_be_of_a_tenant_a_prefix_and_a_number(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE, FAR)
        await world.put_on_disk_only(FAR, tenant_id="other")
        await world.put(TWO)
        for tenant_id, prefix, limit, number in (
            ("", b"", 0, 4),
            (TENANT, b"", 0, 3),
            (TENANT, b"\x07", 0, 1),
            ("", b"\x07", 0, 2),
            ("", TWO.chunk_id, 0, 1),
            ("", b"", 3, 3),
            ("nobody", b"", 0, 0),
        ):
            keys = [listed.record.key for listed in world.admin.list(tenant_id, prefix, limit)]
            assert len(keys) == number
            assert keys == sorted(keys)


async def test_a_whole_store_verifies_each_copy_once(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, TWO, durable=True)
        await world.put(THREE, tenant_id="other")
        for tenant_id, keys, number in (
            ("", [], 5),
            ("other", [], 1),
            (TENANT, [key_of(ONE), key_of(THREE)], 2),
            ("nobody", [], 0),
        ):
            result = await verified(world, tenant_id, keys)
            assert (result.num_checked, result.num_total, result.damaged) == (number, number, [])
            assert result.bytes_checked == number * CHUNK_BYTES
        assert world.store.counters.digest_failures == 0


async def test_damage_is_found_on_every_tier_and_taken_out_of_service(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, TWO, THREE, durable=True)
        rot(world, key_of(ONE))
        world.file_of(TWO).write_bytes(TWO.data[:-1] + b"?")
        world.file_of(THREE).unlink()
        result = await verified(world)
        assert (result.num_checked, result.num_total) == (6, 6)
        assert [(found.key, found.tier) for found in result.damaged] == [
            (key_of(ONE), Tier.RAM),
            (key_of(TWO), Tier.DISK),
            (key_of(THREE), Tier.DISK),
        ]
        assert all(isinstance(found, Damage) and found.reason for found in result.damaged)
        assert world.where(ONE, TWO, THREE) == ["DISK", "RAM", "RAM"]
        assert (world.store.counters.digest_failures, world.disk.counters.quarantined) == (2, 2)
        assert (await verified(world)).damaged == []
        assert [answer[1] for answer in await world.get(ONE, TWO, THREE)] == [  # type: ignore[index]  # no item is a miss
            chunk.data for chunk in (ONE, TWO, THREE)
        ]


async def test_an_object_damaged_everywhere_is_missed_and_can_be_stored_again(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        rot(world, key_of(ONE))
        os.truncate(world.file_of(ONE), 10)
        assert len((await verified(world)).damaged) == 2
        assert await world.get(ONE) == [MissReason.NOT_FOUND]
        assert world.store.tenants.held() == {}
        await world.put(ONE, durable=True)


async def test_progress_is_told_after_each_copy(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, TWO, durable=True)
        seen = [progress.num_checked async for progress in world.admin.verify("", [])]
        assert seen == [1, 2, 3, 4, 4]


async def test_what_no_row_names_and_rows_without_a_file_are_collected(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        await world.put_on_disk_only(TWO, THREE)
        folder = world.file_of(ONE).parent
        for name in ("stranger", f"{ONE.chunk_id.hex()}-f0.safetensors"):
            (folder / name).write_bytes(b"12345")
        world.file_of(TWO).unlink()
        for dry_run in (True, False):
            result = await collected(world, dry_run=dry_run)
            assert result == Collected(orphans=Totals(2, 10), lost_rows=1)
        assert world.where(ONE, TWO, THREE) == ["RAM+DISK", "", "DISK"]
        assert await collected(world) == NOTHING


async def test_the_quarantine_is_counted_and_emptied(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(ONE)
        world.file_of(ONE).write_bytes(ONE.data[:-1] + b"?")
        await verified(world)
        for dry_run in (True, False):
            assert (await collected(world, dry_run=dry_run)).quarantined == Totals(1, CHUNK_BYTES)
        assert await collected(world) == NOTHING


async def test_what_nobody_used_for_long_goes_unless_it_is_pinned(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        await world.put(TWO, THREE)
        world.clock.now += 100.0
        world.store.pin([key_of(TWO)], "me", 1e4)
        world.clock.now += 1000.0
        await world.get(THREE)
        assert await collected(world, idle_s=2000.0) == NOTHING
        for dry_run in (True, False):
            result = await collected(world, idle_s=1000.0, dry_run=dry_run)
            assert result == Collected(dropped=Totals(1, CHUNK_BYTES))
        assert world.where(ONE, TWO, THREE) == ["", "RAM", "RAM"]


@pytest.mark.parametrize("is_idle", [False, True])
async def test_a_store_without_a_disk_has_nothing_of_no_use_but_what_is_idle(is_idle: bool) -> None:
    async with open_world() as world:
        await world.put(ONE)
        world.clock.now += 10.0
        dropped = Totals(1, CHUNK_BYTES) if is_idle else Totals()
        assert await collected(world, idle_s=5.0 * is_idle) == Collected(dropped=dropped)


async def test_a_collection_that_drops_nothing_does_not_look_at_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE)
        with monkeypatch.context() as patched:
            patched.setattr(Housekeeping, "list", None)
            assert await collected(world) == NOTHING


async def test_a_collection_in_parts_spares_what_was_used_since_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spolia_kvstore.housekeeping.LOOKED_AT_ONCE", 1)
    async with open_world(tmp_path) as world:
        await world.put(ONE, TWO)
        await world.put_on_disk_only(THREE)
        world.clock.now += 1000.0
        delete = world.store.delete

        async def delete_and_read_another(keys: Sequence[ObjectKey]) -> Dropped:
            await world.get(TWO)
            return await delete(keys)

        monkeypatch.setattr(world.store, "delete", delete_and_read_another)
        assert (await collected(world, idle_s=900.0)).dropped == Totals(2, 2 * CHUNK_BYTES)
        assert world.where(ONE, TWO, THREE) == ["", "RAM", ""]
