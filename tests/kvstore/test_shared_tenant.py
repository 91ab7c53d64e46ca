"""Objects of the tenant "shared": read by all, written under its own name only."""

from __future__ import annotations

from pathlib import Path

from kvstore_worlds import TENANT, key_of, make_chunk
from tier_worlds import ANYONE, World, open_world

from spolia_core.ids import SHARED_TENANT
from spolia_core.reuse import MissReason
from spolia_kvstore.catalog import Totals
from spolia_kvstore.objects import Tier
from spolia_kvstore.store import ClaimState

CHUNK, PRIVATE = make_chunk(1), make_chunk(2)
KEY = key_of(CHUNK)


async def claim_state(world: World, tenant_id: str = TENANT) -> ClaimState:
    (result,) = await world.store.claim([key_of(CHUNK, tenant_id)], "me", 30.0, 0.0)
    return result.state


async def test_every_tenant_reads_what_is_shared_from_any_tier(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        assert await world.get(CHUNK) == [MissReason.NOT_FOUND]
        await world.put_on_disk_only(CHUNK, tenant_id=SHARED_TENANT)
        (entry,) = await world.store.lookup([KEY], ANYONE)
        assert entry.record is not None
        assert (entry.tier, entry.record.key.tenant_id) == (Tier.DISK, SHARED_TENANT)
        assert await world.get(CHUNK) == [(Tier.DISK, CHUNK.data)]
        assert await world.get(CHUNK, tenant_id="another") == [(Tier.RAM, CHUNK.data)]
        assert await claim_state(world) is ClaimState.STORED


async def test_a_read_of_what_is_shared_keeps_it_from_eviction() -> None:
    async with open_world(num_in_memory=2) as world:
        await world.put(CHUNK, tenant_id=SHARED_TENANT)
        await world.put(PRIVATE)
        world.clock.now += 10.0
        await world.get(CHUNK)
        await world.put(make_chunk(3))
        assert (world.where(CHUNK, tenant_id=SHARED_TENANT), world.where(PRIVATE)) == (["RAM"], [""])


async def test_no_other_tenants_objects_are_shared() -> None:
    async with open_world() as world:
        await world.put(CHUNK, tenant_id=TENANT)
        await world.put(PRIVATE, tenant_id=SHARED_TENANT)
        for tenant_id in ("another", SHARED_TENANT):
            assert await world.get(CHUNK, tenant_id=tenant_id) == [MissReason.NOT_FOUND]
            assert await claim_state(world, tenant_id) is ClaimState.GRANTED


async def test_a_tenants_own_object_comes_before_the_shared_one() -> None:
    async with open_world() as world:
        (shared,) = await world.put(CHUNK, tenant_id=SHARED_TENANT)
        (own,) = await world.put(CHUNK)
        (entry,) = await world.store.lookup([KEY], ANYONE)
        assert entry.record is not None
        assert entry.record.replica == own.replica != shared.replica
        assert world.store.tenants.held().keys() == {TENANT, SHARED_TENANT}


async def test_writes_under_another_tenant_never_touch_what_is_shared(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(CHUNK, tenant_id=SHARED_TENANT, durable=True)
        assert world.store.pin([KEY], "me", 60.0) == [False]
        world.store.pin([key_of(CHUNK, SHARED_TENANT)], "me", 60.0)
        assert world.store.unpin([KEY], "me") == 0
        assert (await world.store.delete([KEY])).objects == Totals()
        assert world.store.pins.num_live == 1
        assert world.where(CHUNK, tenant_id=SHARED_TENANT) == ["RAM+DISK"]


async def test_who_writes_as_shared_can_delete_it() -> None:
    async with open_world() as world:
        await world.put(CHUNK, tenant_id=SHARED_TENANT)
        assert (await world.store.delete([key_of(CHUNK, SHARED_TENANT)])).objects.num_objects == 1
        assert await world.get(CHUNK) == [MissReason.NOT_FOUND]
