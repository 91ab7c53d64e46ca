"""A new store on the folder of an old one goes on where that one ended, however it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvstore_worlds import HandClock, key_of, make_chunk
from tier_worlds import ANYONE, CHUNK_BYTES, open_world

from spolia_core.reuse import MissReason
from spolia_kvstore.catalog import Totals
from spolia_kvstore.limits import MAX_LEFT_S
from spolia_kvstore.objects import Tier
from spolia_kvstore.store import ClaimState

ONE, TWO, THREE = (make_chunk(number) for number in (1, 2, 3))
KEY = key_of(ONE)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.mark.parametrize("is_killed", [False, True])
async def test_what_was_safe_is_there_and_what_was_in_memory_only_is_not(
    tmp_path: Path, clock: HandClock, is_killed: bool
) -> None:
    async with open_world(tmp_path, clock=clock, is_killed=is_killed) as world:
        (record,) = await world.put(ONE, durable=True)
        await world.put(TWO)
        await world.put(THREE, tenant_id="other", durable=True)
    async with open_world(tmp_path, clock=clock) as world:
        (entry,) = await world.store.lookup([KEY], ANYONE)
        assert entry.record == record, "the same replica"
        assert await world.get(ONE, TWO) == [(Tier.DISK, ONE.data), MissReason.NOT_FOUND]
        assert world.store.tenants.held() == {tenant: Totals(1, CHUNK_BYTES) for tenant in ("tenant", "other")}
        assert world.disk.used_bytes == 2 * CHUNK_BYTES


async def test_what_was_written_at_the_end_of_the_process_is_there_with_its_uses(
    tmp_path: Path, clock: HandClock
) -> None:
    async with open_world(tmp_path, clock=clock) as world:
        await world.put(ONE)
        await world.tiers.writes.write_all()
        clock.now += 10.0
        await world.get(ONE)
        (before,) = world.admin.list()
    async with open_world(tmp_path, clock=clock) as world:
        (after,) = world.admin.list()
        assert (after.hits, after.age_s, after.idle_s) == (1, 10.0, 0.0)
        assert after.record == before.record


async def test_uses_noted_by_a_sweep_survive_a_kill(tmp_path: Path, clock: HandClock) -> None:
    async with open_world(tmp_path, clock=clock, is_killed=True) as world:
        await world.put_on_disk_only(ONE, TWO)
        clock.now += 1000.0
        await world.store.lookup([KEY], ANYONE)
        await world.store.sweep()
    async with open_world(tmp_path, clock=clock, num_on_disk=2) as world:
        await world.put(THREE, durable=True)
        assert world.where(ONE, TWO) == ["DISK", ""], "the order of eviction is what it was"


@pytest.mark.parametrize("is_killed", [False, True])
async def test_pins_keep_what_is_left_of_their_leases(tmp_path: Path, clock: HandClock, is_killed: bool) -> None:
    async with open_world(tmp_path, clock=clock, is_killed=is_killed) as world:
        await world.put(ONE, TWO, durable=True)
        await world.put(THREE)
        world.store.pin([KEY, key_of(TWO), key_of(THREE)], "me", 60.0)
        world.store.pin([KEY], "short", 20.0)
        world.store.unpin([key_of(TWO)], "me")
    clock.now += 25.0
    async with open_world(tmp_path, clock=clock) as world:
        assert world.store.pins.of(KEY) == [("me", 35.0)]
        assert world.store.pins.num_live == 1, "what is there no more is pinned no more"
        assert [lease.key for lease in world.catalog.pins.standing(0.0)] == [KEY]
        clock.now += 35.0
        assert world.store.pins.num_live == 0


async def test_a_clock_that_was_set_back_makes_no_lease_endless(tmp_path: Path, clock: HandClock) -> None:
    async with open_world(tmp_path, clock=clock) as world:
        await world.put(ONE, durable=True)
        world.store.pin([KEY], "me", 60.0)
        await world.store.claim([key_of(TWO)], "me", 60.0, 0.0)
    clock.now -= 1e6
    async with open_world(tmp_path, clock=clock) as world:
        assert world.store.pins.of(KEY) == [("me", MAX_LEFT_S)]
        (lease,) = await world.store.claims.holders([key_of(TWO)])
        assert lease is not None
        assert lease.remaining_s == MAX_LEFT_S


async def test_claims_stand_with_what_is_left_of_them(tmp_path: Path, clock: HandClock) -> None:
    async with open_world(tmp_path, clock=clock, is_killed=True) as world:
        for key, owner in ((KEY, "a"), (key_of(TWO), "a"), (key_of(THREE), "b")):
            await world.store.claim([key], owner, 30.0, 0.0)
        await world.store.unclaim([key_of(THREE)], "b")
        await world.put(TWO)
    clock.now += 10.0
    async with open_world(tmp_path, clock=clock) as world:
        keys = [KEY, key_of(TWO), key_of(THREE)]
        results = await world.store.claim(keys, "c", 30.0, 0.0)
        assert [(result.state, result.owner) for result in results] == [
            (ClaimState.HELD, "a"),
            (ClaimState.GRANTED, "c"),
            (ClaimState.GRANTED, "c"),
        ]
        assert results[0].ttl_s == 18.0, "a Put took two seconds"
        clock.now += 18.0
        assert (await world.store.claim([KEY], "c", 30.0, 0.0))[0].state is ClaimState.GRANTED


async def test_a_store_that_starts_with_a_smaller_budget_comes_down_at_its_next_write(
    tmp_path: Path, clock: HandClock
) -> None:
    async with open_world(tmp_path, clock=clock) as world:
        await world.put(ONE, TWO, durable=True)
    async with open_world(tmp_path, clock=clock, num_on_disk=1) as world:
        assert world.where(ONE, TWO) == ["DISK", "DISK"]
        await world.put(THREE, durable=True)
        assert world.where(ONE, TWO, THREE) == ["", "", "RAM+DISK"]
