"""The laws of `Backend`, for every implementation; those about several stores for the shared ones.

Redis runs twice: as one server, and as a cluster, which refuses a script whose names do not belong together.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from backend_worlds import (
    HERE,
    LIVE,
    TENANT,
    THERE,
    Ear,
    a_key,
    a_record,
    a_replica,
    all_news_has_come,
    connected,
    eventually,
    eventually_so,
)
from redis_server import RedisServer

from spolia_kvstore.backend import Backend, ClaimAnswer, Replica
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.objects import ObjectKey, Tier

KEY, OTHER = a_key(1), a_key(2)
ODD_TENANTS = ["a", "a}b", "{a}", "}{", "{}", "a:b", "a.b", " ", "a\n", "ä€😀", "x" * 256, "A"]
STORED = ClaimAnswer(is_stored=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("cluster"), cluster=True) as running:
        yield running


@pytest.fixture(params=["sqlite", "server", "cluster"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    """One of each kind, with nothing in it."""
    if request.param == "sqlite":
        async with embedded(tmp_path / "index.sqlite") as alone:
            yield alone
    else:
        async with connected(request.getfixturevalue(request.param), uuid4().hex) as redis:
            yield redis


@pytest.fixture(params=["server", "cluster"])
async def shared(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """One of each kind that several stores use, with nothing in it."""
    async with connected(request.getfixturevalue(request.param), uuid4().hex) as redis:
        assert redis.is_shared
        yield redis


@asynccontextmanager
async def embedded(path: Path) -> AsyncIterator[Backend]:
    catalog = Catalog(str(path))
    backend = EmbeddedBackend(catalog)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()
        catalog.close()


# The index


async def test_what_is_published_is_located_with_every_field(backend: Backend) -> None:
    replica = a_replica(KEY)
    await backend.publish([replica])
    assert await backend.locate(TENANT, [KEY.chunk_id, OTHER.chunk_id], {HERE}) == {KEY.chunk_id: [replica]}


async def test_an_id_belongs_to_one_tenant_however_it_is_called(backend: Backend) -> None:
    await backend.publish([a_replica(a_key(1, tenant_id)) for tenant_id in ODD_TENANTS[::2]])
    for index, tenant_id in enumerate(ODD_TENANTS):
        found = await backend.locate(tenant_id, [KEY.chunk_id], {HERE})
        assert found == ({KEY.chunk_id: [a_replica(a_key(1, tenant_id))]} if index % 2 == 0 else {})


async def test_claims_belong_to_one_tenant_however_it_is_called(backend: Backend) -> None:
    ear = Ear(backend)
    keys = [a_key(1, tenant_id) for tenant_id in ODD_TENANTS]
    for key in keys:
        assert owner_of(await backend.claim([key], f"owner of {key.tenant_id}", 60.0, {HERE})) == (
            f"owner of {key.tenant_id}"
        )
    assert all(await backend.unclaim(keys, None))
    await all_news_has_come(backend, ear)
    assert ear.ended == keys


async def test_the_fastest_tier_comes_first(backend: Backend) -> None:
    await backend.publish([a_replica(KEY, Tier.DISK)])
    await backend.publish([a_replica(KEY, Tier.RAM)])
    assert await tiers_of(backend) == [Tier.RAM, Tier.DISK]


async def test_replicas_of_one_call_are_all_kept(backend: Backend) -> None:
    await backend.publish([a_replica(KEY, Tier.DISK), a_replica(OTHER), a_replica(KEY, Tier.RAM)])
    assert await tiers_of(backend) == [Tier.RAM, Tier.DISK]


async def test_withdrawing_from_one_tier_leaves_the_other(backend: Backend) -> None:
    await backend.publish([a_replica(KEY, Tier.RAM), a_replica(KEY, Tier.DISK)])
    await backend.withdraw(HERE, [KEY, OTHER], Tier.RAM)
    assert await tiers_of(backend) == [Tier.DISK]
    await backend.withdraw(HERE, [KEY, OTHER], Tier.DISK)
    assert await tiers_of(backend) == []


async def test_a_replica_published_again_replaces_the_first(backend: Backend) -> None:
    await backend.publish([a_replica(KEY)])
    await backend.publish([a_replica(KEY)])
    assert await tiers_of(backend) == [Tier.RAM]


async def test_replicas_of_dead_stores_are_not_located(shared: Backend) -> None:
    await shared.publish([a_replica(KEY, Tier.DISK, HERE), a_replica(KEY, Tier.RAM, THERE)])
    assert await located(shared, LIVE) == [(THERE, Tier.RAM), (HERE, Tier.DISK)]
    assert await located(shared, {HERE}) == [(HERE, Tier.DISK)]
    assert await located(shared, set()) == []


async def test_a_store_withdraws_only_its_own_replicas(shared: Backend) -> None:
    await shared.publish([a_replica(KEY, store_id=HERE), a_replica(KEY, store_id=THERE)])
    await shared.withdraw(HERE, [KEY], Tier.RAM)
    assert await located(shared, LIVE) == [(THERE, Tier.RAM)]


async def test_store_ids_may_be_any_text(shared: Backend) -> None:
    odd = ["1:a", "a:b", "{b}", "ä€😀", "a\nb"]
    await shared.publish([a_replica(KEY, store_id=store_id) for store_id in odd])
    for store_id in odd:
        assert await located(shared, {store_id}) == [(store_id, Tier.RAM)]
        assert await shared.claim([KEY], "a", 60.0, {store_id}) == [STORED]
    assert await shared.claim([KEY], "a", 60.0, {"b", "a"}) != [STORED]


# Claims


async def test_the_first_to_claim_computes_and_others_learn_who_and_for_how_long(backend: Backend) -> None:
    (granted,) = await backend.claim([KEY], "a", 60.0, {HERE})
    (held,) = await backend.claim([KEY], "b", 600.0, {HERE})
    (standing,) = await backend.claims([KEY])
    for lease in (granted.lease, held.lease, standing):
        assert lease is not None
        assert lease.owner == "a"
        assert 30.0 < lease.remaining_s <= 60.0


async def test_the_owner_renews_its_claim(backend: Backend) -> None:
    await backend.claim([KEY], "a", 60.0, {HERE})
    (renewed,) = await backend.claim([KEY], "a", 600.0, {HERE})
    assert renewed.lease is not None
    assert renewed.lease.remaining_s > 60.0


async def test_keys_of_one_call_are_decided_each_for_itself(backend: Backend) -> None:
    stored, held, free = a_key(1), a_key(2), a_key(3)
    await backend.publish([a_replica(stored)])
    await backend.claim([held], "a", 60.0, {HERE})
    answers = await backend.claim([stored, held, free], "b", 60.0, {HERE})
    assert [answer.is_stored for answer in answers] == [True, False, False]
    assert [answer.lease and answer.lease.owner for answer in answers] == [None, "a", "b"]


async def test_a_claim_lapses(backend: Backend) -> None:
    await backend.claim([KEY], "a", 0.02, {HERE})

    async def is_free() -> bool:
        return await backend.claims([KEY]) == [None]

    await eventually_so(is_free)
    assert owner_of(await backend.claim([KEY], "b", 60.0, {HERE})) == "b"


async def test_only_the_owner_ends_a_claim(backend: Backend) -> None:
    ear = Ear(backend)
    await backend.claim([KEY], "a", 60.0, {HERE})
    assert await backend.unclaim([KEY, OTHER], "b") == [False, False]
    assert owner_of(await backend.claim([KEY], "b", 60.0, {HERE})) == "a"
    assert await backend.unclaim([KEY], "a") == [True]
    assert await backend.unclaim([KEY], "a") == [False]
    await all_news_has_come(backend, ear)
    assert ear.ended == [KEY]


async def test_nobody_in_particular_ends_anybodys_claim(backend: Backend) -> None:
    await backend.claim([KEY], "a", 60.0, {HERE})
    await backend.claim([OTHER], "b", 60.0, {HERE})
    assert await backend.unclaim([KEY, a_key(3), OTHER], None) == [True, False, True]
    assert await backend.claims([KEY, OTHER]) == [None, None]


async def test_publishing_ends_the_claim_and_tells(backend: Backend) -> None:
    ear = Ear(backend)
    await backend.claim([KEY], "a", 60.0, {HERE})
    await backend.publish([a_replica(KEY), a_replica(OTHER)])
    assert await backend.claims([KEY]) == [None]
    await all_news_has_come(backend, ear)
    assert ear.ended == [KEY]


async def test_what_is_stored_cannot_be_claimed_until_it_is_gone(backend: Backend) -> None:
    await backend.publish([a_replica(KEY, Tier.DISK)])
    assert await backend.claim([KEY], "a", 60.0, {HERE}) == [STORED]
    await backend.withdraw(HERE, [KEY], Tier.DISK)
    assert owner_of(await backend.claim([KEY], "a", 60.0, {HERE})) == "a"


async def test_what_only_dead_stores_hold_can_be_claimed(shared: Backend) -> None:
    await shared.publish([a_replica(KEY, store_id=THERE)])
    assert await shared.claim([KEY], "a", 60.0, LIVE) == [STORED]
    assert owner_of(await shared.claim([KEY], "a", 60.0, {HERE})) == "a"


async def test_of_many_who_claim_at_once_one_is_granted(backend: Backend) -> None:
    owners = [f"owner-{number}" for number in range(20)]
    answers = await asyncio.gather(*(backend.claim([KEY], owner, 60.0, {HERE}) for owner in owners))
    told = {owner_of(answer) for answer in answers}
    assert len(told) == 1
    assert told <= set(owners)


async def test_thousands_of_keys_fit_one_call(backend: Backend) -> None:
    ear = Ear(backend)
    keys = [a_key(number) for number in range(4096)]
    assert {owner_of([answer]) for answer in await backend.claim(keys, "a", 60.0, {HERE})} == {"a"}
    await backend.publish([a_replica(key) for key in keys])
    assert await backend.claims(keys) == [None] * len(keys)
    found = await backend.locate(TENANT, [key.chunk_id for key in keys], {HERE})
    assert found == {key.chunk_id: [Replica(a_record(key), Tier.RAM, HERE)] for key in keys}
    await backend.withdraw(HERE, keys, Tier.RAM)
    assert await backend.locate(TENANT, [key.chunk_id for key in keys], {HERE}) == {}
    await eventually(lambda: len(ear.ended) == len(keys))
    assert set(ear.ended) == set(keys)


async def test_no_keys_at_all_are_no_trouble(backend: Backend) -> None:
    await backend.publish([])
    await backend.withdraw(HERE, [], Tier.RAM)
    assert await backend.locate(TENANT, [], {HERE}) == {}
    assert await backend.claim([], "a", 60.0, {HERE}) == []
    assert await backend.unclaim([], None) == []
    assert await backend.claims([]) == []


# Members


async def test_sessions_grow(backend: Backend) -> None:
    sessions = [await backend.next_session() for _ in range(5)]
    sessions += sorted(await asyncio.gather(*(backend.next_session() for _ in range(20))))
    assert sessions == sorted(set(sessions))


async def test_members_come_by_node_id_with_what_they_said(backend: Backend) -> None:
    session = await backend.next_session()
    records = {"b": b"record\0of:b\r\n", "ä}": b"", "a": bytes(range(256))}
    for node_id, record in records.items():
        assert await backend.renew_member(node_id, session, record, 60.0)
    members = await backend.members()
    assert [member.node_id for member in members] == sorted(records)
    assert {member.node_id: member.record for member in members} == records
    assert {member.session for member in members} == {session}
    assert all(30.0 < member.remaining_s <= 60.0 for member in members)


async def test_an_older_session_neither_renews_nor_drops_a_member(backend: Backend) -> None:
    older, newer = await backend.next_session(), await backend.next_session()
    assert await backend.renew_member("node", older, b"old", 60.0)
    assert await backend.renew_member("node", newer, b"new", 60.0)
    assert not await backend.renew_member("node", older, b"old", 60.0)
    assert not await backend.drop_member("node", older)
    assert [(member.session, member.record) for member in await backend.members()] == [(newer, b"new")]
    assert await backend.drop_member("node", newer)
    assert not await backend.drop_member("node", newer)
    assert await backend.members() == []


async def test_a_member_lapses_and_all_are_told(backend: Backend) -> None:
    ear = Ear(backend)
    session = await backend.next_session()
    await backend.renew_member("lasting", session, b"", 60.0)
    await backend.renew_member("lapsing", session, b"", 0.02)

    async def has_lapsed() -> bool:
        return [member.node_id for member in await backend.members()] == ["lasting"]

    await eventually_so(has_lapsed)
    await all_news_has_come(backend, ear)
    assert ear.num_member_changes == 3
    assert await backend.renew_member("lapsing", session, b"", 60.0)
    assert len(await backend.members()) == 2
    await all_news_has_come(backend, ear)
    assert ear.num_member_changes == 4


async def test_changes_of_members_are_told_but_not_mere_renewals(backend: Backend) -> None:
    ear = Ear(backend)
    session = await backend.next_session()
    for record in (b"one", b"one", b"two", b"two", b"two", b"one"):
        assert await backend.renew_member("node", session, record, 60.0)
    await all_news_has_come(backend, ear)
    assert ear.num_member_changes == 3
    await backend.members()
    await backend.drop_member("node", session)
    await all_news_has_come(backend, ear)
    assert ear.num_member_changes == 4


def owner_of(answers: list[ClaimAnswer]) -> str:
    (answer,) = answers
    assert answer.lease is not None
    return answer.lease.owner


async def located(backend: Backend, live_stores: set[str], key: ObjectKey = KEY) -> list[tuple[str, Tier]]:
    found = await backend.locate(key.tenant_id, [key.chunk_id], live_stores)
    return [(replica.store_id, replica.tier) for replica in found.get(key.chunk_id, [])]


async def tiers_of(backend: Backend) -> list[Tier]:
    return [tier for _, tier in await located(backend, {HERE})]


# What was deleted on purpose


async def test_what_was_buried_is_not_listed_again_by_a_store_that_was_away(shared: Backend) -> None:
    await shared.publish([a_replica(KEY), a_replica(OTHER)])
    await shared.withdraw(HERE, [KEY, OTHER], Tier.RAM)
    await shared.bury([KEY])
    replicas = [a_replica(KEY, store_id=THERE), a_replica(OTHER, store_id=THERE)]
    assert await shared.publish_again(replicas) == [KEY]
    assert set(await shared.locate(TENANT, [KEY.chunk_id, OTHER.chunk_id], LIVE)) == {OTHER.chunk_id}


async def test_what_was_stored_after_its_burial_is_listed_although_nobody_could_be_told_then(shared: Backend) -> None:
    await shared.bury([KEY])
    later = replace(a_replica(KEY), stored_at=time.time() + 60.0)
    assert await shared.publish_again([later]) == []
    assert set(await shared.locate(TENANT, [KEY.chunk_id], LIVE)) == {KEY.chunk_id}


async def test_a_store_that_stored_it_anew_may_say_so_again_whatever_its_clock_says(shared: Backend) -> None:
    await shared.bury([KEY])
    await shared.publish([a_replica(KEY)])
    assert await shared.publish_again([a_replica(KEY, Tier.DISK)]) == []
    assert await located(shared, LIVE) == [(HERE, Tier.RAM), (HERE, Tier.DISK)]


async def test_storing_it_anew_lists_that_replica_and_not_the_old_one_of_another_store(shared: Backend) -> None:
    await shared.bury([KEY])
    await shared.publish([a_replica(KEY)])
    assert await shared.publish_again([a_replica(KEY, store_id=THERE)]) == [KEY]
    assert await located(shared, LIVE) == [(HERE, Tier.RAM)]


async def test_saying_again_what_was_never_buried_lists_it(backend: Backend) -> None:
    assert await backend.publish_again([a_replica(KEY)]) == []
    assert set(await backend.locate(TENANT, [KEY.chunk_id], LIVE)) == {KEY.chunk_id}
