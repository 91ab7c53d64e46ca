"""The client over several stores: each chunk at its home, every replica where all count, others where one is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from store_fakes import FakeStores, fake_stores
from store_worlds import CODECS, FINGERPRINT, TENANT, Chunk, eventually, make_chunk, soon

from spolia.v1 import common_pb2, kvstore_pb2
from spolia_core.errors import AlreadyStored, Busy, DeadlineExceeded, InvalidRequest, Unavailable
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_client import StoreClient

CHUNKS = [make_chunk(number) for number in range(1, 21)]
IDS = [chunk.chunk_id for chunk in CHUNKS]
GRANTED, HELD, STORED = (
    kvstore_pb2.CLAIM_STATE_GRANTED,
    kvstore_pb2.CLAIM_STATE_HELD,
    kvstore_pb2.CLAIM_STATE_STORED,
)


@pytest.fixture
async def loners() -> AsyncIterator[FakeStores]:
    """Stores that know nothing of each other."""
    async with fake_stores(3, share_index=False) as running:
        yield running


def client_of(channels: ChannelPool, stores: FakeStores) -> StoreClient:
    return StoreClient(channels, stores, stores.lost.append)


async def put(client: StoreClient, *chunks: Chunk) -> None:
    for chunk in chunks:
        await client.put(TENANT, chunk.info, chunk.data, soon())


async def test_each_chunk_is_put_and_looked_up_at_its_home_and_answers_come_in_order(
    channels: ChannelPool, loners: FakeStores
) -> None:
    client = client_of(channels, loners)
    await put(client, *CHUNKS[::2])
    for chunk in CHUNKS[::2]:
        assert chunk.chunk_id in loners.by_rank(chunk.chunk_id)[0].chunks
    entries = await client.lookup(TENANT, IDS, FINGERPRINT, CODECS, soon(), ignore_cost=True)
    assert [entry.info.chunk_id for entry in entries[::2]] == IDS[::2]
    assert [entry.miss for entry in entries[1::2]] == [common_pb2.MISS_REASON_NOT_FOUND] * 10
    for store in loners.stores:
        (ids,) = store.asked_for("Lookup")
        assert ids == [chunk_id for chunk_id in IDS if loners.by_rank(chunk_id)[0] is store]
        assert store.asked[-1][1].ignore_cost


async def test_what_another_store_holds_counts_as_found(channels: ChannelPool, stores: FakeStores) -> None:
    (chunk, _), client = CHUNKS[:2], client_of(channels, stores)
    stores.by_rank(chunk.chunk_id)[2].chunks[chunk.chunk_id] = chunk
    (entry,) = await client.lookup(TENANT, [chunk.chunk_id], FINGERPRINT, CODECS, soon())
    assert entry.info == chunk.info


async def test_ids_of_a_store_that_is_away_go_to_the_next_of_each(channels: ChannelPool, loners: FakeStores) -> None:
    client, away = client_of(channels, loners), loners.stores[1]
    await away.server.stop_at_once()
    await put(client, *CHUNKS)
    for chunk in CHUNKS:
        first, second, _ = loners.by_rank(chunk.chunk_id)
        assert chunk.chunk_id in (second if first is away else first).chunks
    entries = await client.lookup(TENANT, IDS, FINGERPRINT, CODECS, soon())
    assert [entry.info.chunk_id for entry in entries] == IDS
    results = await client.claim(TENANT, IDS, "me", soon())
    assert [result.state for result in results] == [STORED] * 20
    assert set(loners.lost) == {"s1"}


async def test_what_a_store_refuses_is_not_tried_elsewhere(channels: ChannelPool, loners: FakeStores) -> None:
    client, chunk = client_of(channels, loners), CHUNKS[0]
    home, *others = loners.by_rank(chunk.chunk_id)
    for error in (Busy("full"), InvalidRequest("no"), AlreadyStored("had")):
        home.error = error
        with pytest.raises(type(error)):
            await put(client, chunk)
    assert not any(other.asked for other in others)
    assert not loners.lost


async def test_when_every_store_is_away_that_is_said(channels: ChannelPool, loners: FakeStores) -> None:
    client = client_of(channels, loners)
    for store in loners.stores:
        await store.server.stop_at_once()
    with pytest.raises(Unavailable):
        await client.lookup(TENANT, IDS, FINGERPRINT, CODECS, soon())
    with pytest.raises(Unavailable):
        await put(client, CHUNKS[0])
    with pytest.raises(Unavailable):
        await client.stats(soon())
    with pytest.raises(Unavailable):
        await client.unpin(TENANT, IDS, "me", soon())


async def test_a_sole_store_is_never_reported_lost(channels: ChannelPool) -> None:
    async with fake_stores(1) as stores:
        client = client_of(channels, stores)
        await stores.stores[0].server.stop_at_once()
        with pytest.raises(Unavailable):
            await client.lookup(TENANT, IDS, FINGERPRINT, CODECS, soon())
        with pytest.raises(Unavailable) as caught:
            await client.delete(TENANT, IDS, soon())
        assert stores.stores[0].address.address in caught.value.message
    assert stores.lost == []


async def test_a_put_says_how_safe_it_must_be(channels: ChannelPool, loners: FakeStores) -> None:
    chunk = CHUNKS[0]
    home = loners.by_rank(chunk.chunk_id)[0]
    for durability in (kvstore_pb2.DURABILITY_RAM, kvstore_pb2.DURABILITY_DISK):
        home.chunks.clear()
        await client_of(channels, loners).put(TENANT, chunk.info, chunk.data, soon(), "me", durability=durability)
        header = home.asked[-1][1]
        assert (header.durability, header.claim_owner) == (durability, "me")


async def test_a_delete_asks_every_store_and_sums_what_each_dropped(channels: ChannelPool, stores: FakeStores) -> None:
    for store in stores.stores[:2]:
        store.chunks = {chunk.chunk_id: chunk for chunk in CHUNKS[:3]}
    deleted = await client_of(channels, stores).delete(TENANT, IDS, soon())
    num_bytes = 2 * sum(len(chunk.data) for chunk in CHUNKS[:3])
    assert (deleted.num_deleted, deleted.bytes_deleted) == (6, num_bytes)
    (tier,) = deleted.tiers
    assert (tier.tier, tier.num_objects, tier.num_bytes) == (common_pb2.TIER_RAM, 6, num_bytes)
    assert [store.asked_for("Delete") for store in stores.stores] == [[IDS]] * 3


async def test_a_delete_names_the_stores_it_could_not_ask_after_asking_all_others(
    channels: ChannelPool, stores: FakeStores
) -> None:
    for store in stores.stores:
        store.chunks = {chunk.chunk_id: chunk for chunk in CHUNKS[:3]}
    stores.stores[0].error = Unavailable("draining")
    with pytest.raises(Unavailable) as caught:
        await client_of(channels, stores).delete(TENANT, IDS, soon())
    assert (caught.value.field, caught.value.actual) == ("stores", "s0")
    assert [len(store.chunks) for store in stores.stores] == [3, 0, 0]
    stores.stores[0].error = InvalidRequest("no such ids")
    with pytest.raises(InvalidRequest):
        await client_of(channels, stores).delete(TENANT, IDS, soon())


async def test_a_pin_is_set_where_the_object_is_and_ended_there(channels: ChannelPool, stores: FakeStores) -> None:
    client, (at_home, elsewhere, gone, nowhere) = client_of(channels, stores), CHUNKS[:4]
    home, holder = stores.by_rank(at_home.chunk_id)[0], stores.by_rank(elsewhere.chunk_id)[2]
    home.chunks[at_home.chunk_id] = at_home
    holder.chunks[elsewhere.chunk_id] = elsewhere
    _, dead, second = stores.by_rank(gone.chunk_id)
    dead.chunks[gone.chunk_id] = second.chunks[gone.chunk_id] = gone
    ids = [nowhere.chunk_id, elsewhere.chunk_id, at_home.chunk_id, gone.chunk_id]
    assert await client.pin(TENANT, ids, "me", soon()) == [False, True, True, True]
    assert elsewhere.chunk_id in holder.pins
    assert at_home.chunk_id in home.pins
    assert (gone.chunk_id in dead.pins) != (gone.chunk_id in second.pins), "one replica is enough"
    assert await client.unpin(TENANT, ids, "me", soon()) == 3


async def test_counts_come_from_each_store_and_those_away_are_left_out(
    channels: ChannelPool, stores: FakeStores
) -> None:
    client = client_of(channels, stores)
    assert [stats.node_id for stats in await client.stats(soon())] == ["s0", "s1", "s2"]
    await stores.stores[0].server.stop_at_once()
    assert [stats.node_id for stats in await client.stats(soon())] == ["s1", "s2"]
    home = stores.by_rank(IDS[0])[0]
    if home.node_id != "s0":
        assert (await client.home_stats(IDS[0], soon())).node_id == home.node_id


async def test_stores_that_are_late_are_deadline_exceeded(channels: ChannelPool, loners: FakeStores) -> None:
    client = client_of(channels, loners)
    for store in loners.stores:
        store.claims = dict.fromkeys(IDS, "other")
    with pytest.raises(DeadlineExceeded):
        await client.claim(TENANT, IDS, "me", Deadline.after(0.3), wait_ms=20_000)


# Claims that lie with several stores


async def test_claims_lie_at_their_homes_and_are_given_back_there(channels: ChannelPool, loners: FakeStores) -> None:
    client = client_of(channels, loners)
    results = await client.claim(TENANT, [*IDS, IDS[0]], "me", soon())
    assert [result.state for result in results] == [GRANTED] * 21
    for chunk_id in IDS:
        assert [chunk_id in store.claims for store in loners.by_rank(chunk_id)] == [True, False, False]
    assert await client.unclaim(TENANT, IDS, "me", soon()) == 20
    assert not any(store.claims for store in loners.stores)


async def test_a_wait_ends_when_the_claim_of_any_store_ends(channels: ChannelPool, loners: FakeStores) -> None:
    client = client_of(channels, loners)
    await client.claim(TENANT, IDS, "other", soon())
    waiting = asyncio.ensure_future(client.claim(TENANT, IDS, "me", soon(), wait_ms=15_000))
    await eventually(lambda: all(len(store.asked_for("Claim")) == 3 for store in loners.stores))
    home = loners.by_rank(IDS[7])[0]
    await client.unclaim(TENANT, [IDS[7]], "other", soon())
    results = await asyncio.wait_for(waiting, 5)
    assert [i for i, result in enumerate(results) if result.state == GRANTED] == [7]
    assert home.claims[IDS[7]] == "me"


async def test_work_that_can_begin_is_not_waited_for(channels: ChannelPool, loners: FakeStores) -> None:
    client = client_of(channels, loners)
    await client.claim(TENANT, IDS[1:], "other", soon())
    results = await asyncio.wait_for(client.claim(TENANT, IDS, "me", soon(), wait_ms=15_000), 5)
    assert [result.state for result in results] == [GRANTED] + [HELD] * 19


async def test_a_wait_at_a_store_that_dies_goes_on_at_the_next(channels: ChannelPool, loners: FakeStores) -> None:
    client, (first, second, _) = client_of(channels, loners), loners.by_rank(IDS[0])
    first.claims[IDS[0]] = second.claims[IDS[0]] = "other"
    waiting = asyncio.ensure_future(client.claim(TENANT, IDS[:1], "me", soon(), wait_ms=1000))
    await eventually(lambda: len(first.asked) == 1)
    await first.server.stop_at_once()
    (result,) = await asyncio.wait_for(waiting, 5)
    assert (result.state, result.owner) == (HELD, "other")
    (asked,) = [request for _, request in second.asked]
    assert 0 < asked.wait_ms <= 1000
