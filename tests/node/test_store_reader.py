"""Get over several stores: in order, whole, from wherever an intact replica is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import pytest
from store_fakes import FakeStores
from store_worlds import CODECS, FINGERPRINT, TENANT, Chunk, eventually, make_chunk

from spolia_core.chunk_object import ChunkMeta, KvShape, build_chunk_object
from spolia_core.errors import DeadlineExceeded, Unavailable
from spolia_core.reuse import ChunkKind, MissReason
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.rpc_messages import object_info
from spolia_node.store_client import StoreClient
from spolia_node.store_stream import FetchedChunk

CHUNKS = [make_chunk(number) for number in range(1, 21)]
CHUNK, ID = CHUNKS[0], CHUNKS[0].chunk_id


def client_of(channels: ChannelPool, stores: FakeStores) -> StoreClient:
    return StoreClient(channels, stores, stores.lost.append)


async def fetch(
    client: StoreClient, ids: Sequence[bytes], *, seconds: float = 20.0, ignore_cost: bool = False
) -> list[FetchedChunk]:
    deadline = Deadline.after(seconds)
    got = client.get(TENANT, ids, FINGERPRINT, CODECS, deadline, ignore_cost=ignore_cost)
    return [chunk async for chunk in got]


def other_replica(chunk: Chunk) -> Chunk:
    """The same chunk in other bytes: another node computed it with another rounding."""
    shape = KvShape(num_layers=2, num_kv_heads=2, head_dim=4, v_dim=4, dtype="F32")
    meta = ChunkMeta(chunk.chunk_id, ChunkKind.LOCAL, FINGERPRINT, 8, shape)
    layers = [(memoryview(bytes([7]) * shape.key_bytes(8)), memoryview(bytes([9]) * shape.value_bytes(8)))] * 2
    data = build_chunk_object(meta, layers)
    assert data != chunk.data
    return Chunk(chunk.chunk_id, data, object_info(meta, data, replica="other"))


async def test_chunks_of_all_stores_come_in_the_order_asked(channels: ChannelPool, stores: FakeStores) -> None:
    for chunk in CHUNKS[::2]:
        stores.by_rank(chunk.chunk_id)[0].chunks[chunk.chunk_id] = chunk
    got = await fetch(client_of(channels, stores), [chunk.chunk_id for chunk in CHUNKS], ignore_cost=True)
    assert [(c.index, c.chunk_id) for c in got] == [(i, c.chunk_id) for i, c in enumerate(CHUNKS)]
    assert [c.data for c in got] == [c.data if i % 2 == 0 else None for i, c in enumerate(CHUNKS)]
    assert {c.miss for c in got[1::2]} == {MissReason.NOT_FOUND}
    for store in stores.stores:
        ((_, request),) = store.asked
        assert request.ignore_cost


async def test_a_chunk_comes_before_those_behind_it_can(channels: ChannelPool, stores: FakeStores) -> None:
    home = stores.by_rank(ID)[0]
    behind = next(chunk for chunk in CHUNKS if stores.by_rank(chunk.chunk_id)[0] is not home)
    other = stores.by_rank(behind.chunk_id)[0]
    home.chunks[ID], other.chunks[behind.chunk_id], other.hold = CHUNK, behind, asyncio.Event()
    client = client_of(channels, stores)
    ids = [ID, behind.chunk_id]
    async with aclosing(client.get(TENANT, ids, FINGERPRINT, CODECS, Deadline.after(20))) as chunks:
        assert (await anext(chunks)).data == CHUNK.data
        assert other.num_reading == 1, "the other stream is under way already"
        other.hold.set()
        assert (await anext(chunks)).data == behind.data


async def test_a_chunk_that_only_another_store_has_is_had_from_there(channels: ChannelPool, stores: FakeStores) -> None:
    holder = stores.by_rank(ID)[2]
    holder.chunks[ID] = CHUNK
    (got,) = await fetch(client_of(channels, stores), [ID])
    assert (got.data, got.miss) == (CHUNK.data, None)
    assert stores.by_rank(ID)[1].asked == [], "the home names the holder"


@pytest.mark.parametrize("num_frames", [0, 1, 5])
async def test_an_object_whose_store_dies_is_restarted_from_the_other_replica(
    channels: ChannelPool, stores: FakeStores, num_frames: int
) -> None:
    home, second, third = stores.by_rank(ID)
    other = other_replica(CHUNK)
    home.chunks[ID], third.chunks[ID], home.break_after = CHUNK, other, num_frames
    (got,) = await fetch(client_of(channels, stores), [ID])
    assert got.data == other.data, "not a byte of the first replica is in it"
    assert got.entry.info.digest == other.info.digest
    assert stores.lost == [home.node_id]
    assert second.asked_for("Get") == [[ID]], "the next store was asked who has it"


async def test_all_that_a_dead_store_owed_comes_from_the_others_in_order(
    channels: ChannelPool, stores: FakeStores
) -> None:
    for chunk in CHUNKS:
        for store in stores.by_rank(chunk.chunk_id)[:2]:
            store.chunks[chunk.chunk_id] = chunk
    dying = stores.by_rank(CHUNKS[3].chunk_id)[0]
    dying.break_after = 3
    got = await fetch(client_of(channels, stores), [chunk.chunk_id for chunk in CHUNKS])
    assert [c.index for c in got] == list(range(len(CHUNKS)))
    assert [c.data for c in got] == [chunk.data for chunk in CHUNKS]
    for store in stores.stores:
        assert len(store.asked_for("Get")) <= 2, "one stream more for each store, not one for each chunk"


async def test_a_damaged_replica_is_passed_over_for_an_intact_one(channels: ChannelPool, stores: FakeStores) -> None:
    home, _, third = stores.by_rank(ID)
    home.chunks[ID], third.chunks[ID] = CHUNK, other_replica(CHUNK)
    home.damaged.add(ID)
    behind = next(c for c in CHUNKS[1:] if stores.by_rank(c.chunk_id)[0] is home)
    home.chunks[behind.chunk_id] = behind
    first, second = await fetch(client_of(channels, stores), [ID, behind.chunk_id])
    assert first.data == third.chunks[ID].data
    assert second.data == behind.data, "the stream of the damaged one goes on"
    assert stores.lost == []


async def test_what_is_damaged_everywhere_stays_a_digest_miss(channels: ChannelPool, stores: FakeStores) -> None:
    home, _, third = stores.by_rank(ID)
    for store in (home, third):
        store.chunks[ID] = CHUNK
        store.damaged.add(ID)
    (got,) = await fetch(client_of(channels, stores), [ID])
    assert (got.data, got.miss) == (None, MissReason.DIGEST)
    assert len(home.asked_for("Get")) == len(third.asked_for("Get")) == 1, "no replica is asked for twice"


@pytest.mark.parametrize("reason", [MissReason.FINGERPRINT, MissReason.SLOWER_THAN_COMPUTING])
async def test_what_the_reader_cannot_use_is_not_looked_for_elsewhere(
    channels: ChannelPool, stores: FakeStores, reason: MissReason
) -> None:
    home, second, third = stores.by_rank(ID)
    home.chunks[ID] = third.chunks[ID] = CHUNK
    home.refused[ID] = reason
    (got,) = await fetch(client_of(channels, stores), [ID])
    assert got.miss is reason
    assert second.asked == third.asked == []


async def test_a_replica_that_cannot_be_read_is_passed_over(channels: ChannelPool, stores: FakeStores) -> None:
    home, _, third = stores.by_rank(ID)
    home.chunks[ID] = third.chunks[ID] = CHUNK
    home.refused[ID] = MissReason.UNREADABLE
    (got,) = await fetch(client_of(channels, stores), [ID])
    assert got.data == CHUNK.data


async def test_a_chunk_whose_only_store_died_is_not_found_and_the_others_still_come(
    channels: ChannelPool, stores: FakeStores
) -> None:
    home = stores.by_rank(ID)[0]
    home.chunks[ID], home.break_after = CHUNK, 2
    alive = next(c for c in CHUNKS if stores.by_rank(c.chunk_id)[0] is not home)
    stores.by_rank(alive.chunk_id)[0].chunks[alive.chunk_id] = alive
    lost, found = await fetch(client_of(channels, stores), [ID, alive.chunk_id])
    assert (lost.data, lost.miss) == (None, MissReason.NOT_FOUND)
    assert found.data == alive.data


async def test_when_no_store_can_be_reached_that_is_said(channels: ChannelPool, stores: FakeStores) -> None:
    for store in stores.stores:
        await store.server.stop_at_once()
    with pytest.raises(Unavailable):
        await fetch(client_of(channels, stores), [ID])
    assert sorted(stores.lost) == ["s0", "s1", "s2"]


async def test_closing_the_iterator_ends_the_calls_on_all_stores(channels: ChannelPool, stores: FakeStores) -> None:
    for chunk in CHUNKS:
        stores.by_rank(chunk.chunk_id)[0].chunks[chunk.chunk_id] = chunk
    home = stores.by_rank(ID)[0]
    for store in stores.stores:
        if store is not home:
            store.hold = asyncio.Event()
    client = client_of(channels, stores)
    ids = [chunk.chunk_id for chunk in CHUNKS]
    async with aclosing(client.get(TENANT, ids, FINGERPRINT, CODECS, Deadline.after(20))) as chunks:
        await anext(chunks)
        await eventually(lambda: sum(store.num_reading for store in stores.stores) >= 2)
    await eventually(lambda: all(store.num_reading == 0 for store in stores.stores))


async def test_a_reader_that_is_cancelled_ends_the_calls_on_all_stores(
    channels: ChannelPool, stores: FakeStores
) -> None:
    for store in stores.stores:
        store.hold = asyncio.Event()
    ids = [chunk.chunk_id for chunk in CHUNKS]
    task = asyncio.ensure_future(fetch(client_of(channels, stores), ids))
    await eventually(lambda: all(store.num_reading == 1 for store in stores.stores))
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    await eventually(lambda: all(store.num_reading == 0 for store in stores.stores))


async def test_the_deadline_bounds_a_get_wherever_it_looks(channels: ChannelPool, stores: FakeStores) -> None:
    home, *others = stores.by_rank(ID)
    home.chunks[ID], home.break_after = CHUNK, 1
    for store in others:
        store.chunks[ID], store.hold = CHUNK, asyncio.Event()
    with pytest.raises(DeadlineExceeded):
        await fetch(client_of(channels, stores), [ID], seconds=0.5)
    await eventually(lambda: all(store.num_reading == 0 for store in others))
