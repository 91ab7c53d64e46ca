"""A shared index is told what a store holds, and told again after it was away: two stores on one backend in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_backend import FakeShared
from kvstore_worlds import key_of, make_chunk
from site_worlds import Site, held_by, open_site, replicas_of
from tier_worlds import ANYONE, open_world

from spolia_core.errors import AlreadyStored
from spolia_core.ids import SHARED_TENANT
from spolia_core.reuse import MissReason
from spolia_kvstore.index_sync import IndexSync
from spolia_kvstore.objects import Tier
from spolia_kvstore.store import ClaimState

ONE, TWO = make_chunk(1), make_chunk(2)
KEY = key_of(ONE)


async def test_the_index_follows_an_object_through_the_tiers(shared: FakeShared, pair: tuple[Site, Site]) -> None:
    here, _ = pair
    world = here.world
    await world.put(ONE, durable=True)
    await here.settled()
    assert replicas_of(shared) == {(ONE.chunk_id, Tier.RAM, "node"), (ONE.chunk_id, Tier.DISK, "node")}
    world.drop_from_memory(KEY)
    await here.settled()
    assert replicas_of(shared) == held_by(here) == {(ONE.chunk_id, Tier.DISK, "node")}
    await world.get(ONE)
    await here.settled()
    assert replicas_of(shared) == held_by(here)
    await world.store.delete([KEY])
    await here.settled()
    assert replicas_of(shared) == set()


async def test_another_store_names_the_holder_and_takes_no_second_copy(pair: tuple[Site, Site]) -> None:
    here, there = pair
    await here.world.put(ONE)
    (entry,) = await there.world.store.lookup([KEY], ANYONE)
    assert [(place.store_id, place.address, place.tier) for place in entry.locations] == [
        ("node", "localhost:1", Tier.RAM)
    ]
    assert await there.world.get(ONE) == [MissReason.NOT_FOUND], "its bytes are had from the holder"
    assert [r.state for r in await there.world.store.claim([KEY], "a", 30.0, 0.0)] == [ClaimState.STORED]
    with pytest.raises(AlreadyStored, match="at node"):
        await there.world.put(ONE)
    await there.world.put(ONE, durable=True)


async def test_what_is_shared_by_tenants_is_found_at_other_stores_too(pair: tuple[Site, Site]) -> None:
    here, there = pair
    await here.world.put(ONE, tenant_id=SHARED_TENANT)
    (entry,) = await there.world.store.lookup([KEY], ANYONE)
    assert [place.store_id for place in entry.locations] == ["node"]


async def test_while_the_index_is_away_a_store_serves_what_it_has_and_says_it_later(
    shared: FakeShared, pair: tuple[Site, Site]
) -> None:
    here, there = pair
    await here.world.put(TWO, durable=True)
    await here.settled()
    here.backend.reachable = False
    await here.world.put(ONE)
    await here.world.store.delete([key_of(TWO)])
    assert [answer[0] for answer in await here.world.get(ONE)] == [Tier.RAM]  # type: ignore[index]  # no item is a miss
    assert [r.state for r in await here.world.store.claim([key_of(TWO)], "a", 30.0, 0.0)] == [ClaimState.GRANTED]
    await here.settled()
    await here.walked()
    assert replicas_of(shared) == held_by(here) == {(ONE.chunk_id, Tier.RAM, "node")}
    assert here.world.store.index.unsaid == here.world.store.index.unburied == set()
    (lease,) = await there.world.store.claims.holders([key_of(TWO)])
    assert lease is not None
    assert lease.owner == "a"


async def test_what_left_while_the_index_was_away_is_withdrawn_tier_by_tier(
    shared: FakeShared, pair: tuple[Site, Site]
) -> None:
    here, _ = pair
    await here.world.put(ONE, TWO, durable=True)
    await here.settled()
    here.backend.reachable = False
    for chunk in (ONE, TWO):
        here.world.drop_from_memory(key_of(chunk))
    await here.settled()
    shared.log.clear()
    await here.walked()
    assert [each for each in shared.log if each.startswith("withdraw")] == ["withdraw 2"]
    assert replicas_of(shared) == held_by(here)
    assert here.world.store.index.unsaid == set()


async def test_what_is_stored_again_after_a_delete_that_could_not_be_said_stays(
    shared: FakeShared, pair: tuple[Site, Site]
) -> None:
    here, _ = pair
    await here.world.put(ONE, TWO, durable=True)
    await here.settled()
    here.backend.reachable = False
    await here.world.store.delete([KEY, key_of(TWO)])
    await here.world.put(ONE, durable=True)
    for _ in range(2):
        await here.walked()
        await here.settled()
    assert here.world.where(ONE, TWO) == ["RAM+DISK", ""]
    assert replicas_of(shared) == held_by(here)
    assert key_of(TWO) in shared.buried


async def test_an_index_that_lost_everything_is_whole_after_one_walk(
    shared: FakeShared, pair: tuple[Site, Site]
) -> None:
    here, there = pair
    await here.world.put(ONE, durable=True)
    await there.world.put(TWO)
    await here.settled()
    shared.replicas.clear()
    for site in pair:
        await site.walked()
    assert replicas_of(shared) == held_by(here) | held_by(there)


async def test_what_a_store_held_in_memory_before_it_died_is_withdrawn_at_its_start(
    shared: FakeShared, tmp_path: Path
) -> None:
    async with open_site(shared, "node", tmp_path) as site:
        await site.world.put(ONE, durable=True)
        await site.settled()
    assert (ONE.chunk_id, Tier.RAM, "node") in replicas_of(shared)
    async with open_site(shared, "node", tmp_path):
        assert replicas_of(shared) == {(ONE.chunk_id, Tier.DISK, "node")}


async def test_an_entry_of_this_store_without_an_object_is_withdrawn_when_somebody_asks(
    shared: FakeShared, pair: tuple[Site, Site]
) -> None:
    here, _ = pair
    await here.world.put(ONE)
    stale = dict(shared.replicas)
    await here.world.store.delete([KEY])
    await here.settled()
    shared.replicas.update(stale)
    await here.world.store.lookup([KEY], ANYONE)
    await here.settled()
    assert replicas_of(shared) == set()


async def test_a_store_that_is_alone_says_nothing() -> None:
    async with open_world() as world:
        sync = IndexSync(world.store)
        sync.start()
        await world.put(ONE)
        assert sync._task is None
        await sync.stop()
