"""The store's client against a real store, and against one that lies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
import pytest
from store_worlds import (
    CODECS,
    FINGERPRINT,
    TENANT,
    Chunk,
    end_at_once,
    eventually,
    fetch,
    lying_store,
    make_chunk,
    running_store,
    soon,
)

from spolia.v1 import kvstore_pb2
from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.kvstore_pb2 import GetHeader, GetResponse, LookupEntry
from spolia_core.chunk_object import parse_chunk_object
from spolia_core.digests import digest, frames
from spolia_core.errors import AlreadyStored, Busy, DataCorrupt, DeadlineExceeded, InvalidRequest, Unavailable
from spolia_core.reuse import MissReason
from spolia_kvstore.node import KVStoreNode
from spolia_kvstore.objects import ObjectKey
from spolia_node.calls import call_errors
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_address import stores_at
from spolia_node.store_client import StoreClient

CHUNK, OTHER = make_chunk(1), make_chunk(2)
GRANTED, STORED = kvstore_pb2.CLAIM_STATE_GRANTED, kvstore_pb2.CLAIM_STATE_STORED


@pytest.fixture
async def node() -> AsyncIterator[KVStoreNode]:
    async with running_store(budget_bytes=64 << 20) as running:
        yield running


@pytest.fixture
def client(channels: ChannelPool, node: KVStoreNode) -> StoreClient:
    return StoreClient(channels, lambda: stores_at(node.server.address))


async def store(client: StoreClient, *chunks: Chunk) -> None:
    for chunk in chunks:
        await client.put(TENANT, chunk.info, chunk.data, soon())


def answer(chunk: Chunk, index: int = 0, **said: object) -> GetResponse:
    """A header for `chunk`, with lies in `said`."""
    info = ObjectInfo()
    info.CopyFrom(chunk.info)
    info.MergeFrom(ObjectInfo(**said))  # type: ignore[arg-type]  # fields differ in type
    return GetResponse(header=GetHeader(index=index, entry=LookupEntry(info=info)))


def frames_of(data: bytes, frame_bytes: int = 100) -> list[GetResponse]:
    return [GetResponse(frame=Frame(offset=o, data=d, digest=x)) for o, d, x in frames(data, frame_bytes)]


async def test_chunks_come_back_whole_and_in_order_around_a_miss(client: StoreClient) -> None:
    big = make_chunk(3, num_tokens=512, head_dim=256)
    await store(client, CHUNK, big)
    nobody = os.urandom(32)
    chunks = await fetch(client, big.chunk_id, nobody, CHUNK.chunk_id)
    assert [(chunk.index, chunk.chunk_id) for chunk in chunks] == [
        (0, big.chunk_id),
        (1, nobody),
        (2, CHUNK.chunk_id),
    ]
    assert [chunk.data for chunk in chunks] == [big.data, None, CHUNK.data]
    assert [chunk.miss for chunk in chunks] == [None, MissReason.NOT_FOUND, None]
    assert chunks[0].data is not None
    assert parse_chunk_object(chunks[0].data).meta.num_tokens == 512


async def test_lookup_says_the_same_as_get_moves(client: StoreClient) -> None:
    await store(client, CHUNK)
    ids = [OTHER.chunk_id, CHUNK.chunk_id]
    entries = await client.lookup(TENANT, ids, FINGERPRINT, CODECS, soon())
    assert entries == [chunk.entry for chunk in await fetch(client, *ids)]
    assert await client.lookup("other", ids, FINGERPRINT, CODECS, soon()) == [entries[0]] * 2
    (refused,) = await client.lookup(TENANT, [CHUNK.chunk_id], b"x" * 32, CODECS, soon())
    assert refused.miss == MissReason.FINGERPRINT


async def test_nothing_asked_is_nothing_answered(client: StoreClient) -> None:
    assert await fetch(client) == []
    assert await client.lookup(TENANT, [], FINGERPRINT, CODECS, soon()) == []
    assert await client.claim(TENANT, [], "a", soon(), wait_ms=10_000) == []


async def test_a_second_put_is_already_stored_and_a_bad_one_names_its_field(client: StoreClient) -> None:
    await store(client, CHUNK)
    with pytest.raises(AlreadyStored):
        await store(client, CHUNK)
    with pytest.raises(InvalidRequest) as caught:
        await client.put(TENANT, OTHER.info, OTHER.data[:-1], soon())
    assert caught.value.field == "info.size_bytes"


async def test_a_store_without_room_says_busy_and_a_pin_is_why(client: StoreClient) -> None:
    pinned, wanted = (make_chunk(number, num_tokens=5000, head_dim=256) for number in (3, 4))  # 39 MiB each
    await store(client, pinned)
    assert await client.pin(TENANT, [pinned.chunk_id, wanted.chunk_id], "me", soon()) == [True, False]
    with pytest.raises(Busy) as caught:
        await store(client, wanted)
    assert caught.value.retry_after_ms > 0
    assert await client.unpin(TENANT, [pinned.chunk_id], "me", soon()) == 1
    await store(client, wanted)
    assert (await client.stats(soon()))[0].evictions == 1


async def test_deleted_chunks_are_gone(client: StoreClient) -> None:
    await store(client, CHUNK)
    deleted = await client.delete(TENANT, [CHUNK.chunk_id, OTHER.chunk_id], soon())
    assert (deleted.num_deleted, deleted.bytes_deleted) == (1, len(CHUNK.data))
    (gone,) = await fetch(client, CHUNK.chunk_id)
    assert gone.miss is MissReason.NOT_FOUND


async def test_a_byte_flipped_in_the_store_is_a_miss_and_the_next_chunk_still_comes(
    node: KVStoreNode, client: StoreClient
) -> None:
    await store(client, CHUNK, OTHER)
    stored = node.store.tiers.ram.find(ObjectKey(TENANT, CHUNK.chunk_id))
    assert stored is not None
    (middle,) = stored.extent.pieces(stored.size // 2, stored.size // 2 + 1)
    middle[0] ^= 0x10
    damaged, whole = await fetch(client, CHUNK.chunk_id, OTHER.chunk_id)
    assert (damaged.data, damaged.miss) == (None, MissReason.DIGEST)
    assert (whole.data, whole.miss) == (OTHER.data, None)
    assert (await client.stats(soon()))[0].digest_failures == 1
    await store(client, CHUNK)
    (again,) = await fetch(client, CHUNK.chunk_id)
    assert again.data == CHUNK.data


FRAMES = frames_of(CHUNK.data)
REHASHED = bytes(len(CHUNK.data))


LIES = pytest.mark.parametrize(
    ("lie", "responses"),
    [
        ("a frame is missing", [answer(CHUNK), *FRAMES[:1], *FRAMES[2:]]),
        ("a frame comes twice", [answer(CHUNK), FRAMES[0], *FRAMES]),
        ("frames change places", [answer(CHUNK), FRAMES[1], FRAMES[0], *FRAMES[2:]]),
        ("the last frame is missing", [answer(CHUNK), *FRAMES[:-1]]),
        ("there are no frames", [answer(CHUNK)]),
        ("a frame's digest is another's", [answer(CHUNK), GetResponse(frame=Frame(data=CHUNK.data, digest=bytes(16)))]),
        ("every frame is right, the whole is not", [answer(CHUNK), *frames_of(REHASHED)]),
        ("it is another chunk", [answer(OTHER), *frames_of(OTHER.data)]),
        ("more bytes than announced", [answer(CHUNK, size_bytes=len(CHUNK.data) - 5), *FRAMES]),
        ("more bytes than any machine has", [answer(CHUNK, size_bytes=2**63), *FRAMES]),
    ],
)


@LIES
async def test_bytes_that_are_not_what_was_announced_are_a_miss_never_data(
    channels: ChannelPool, lie: str, responses: list[GetResponse]
) -> None:
    honest = [answer(OTHER, index=1), *frames_of(OTHER.data)]
    async with lying_store([*responses, *honest]) as server:
        client = StoreClient(channels, lambda: stores_at(server.address))
        first, second = await fetch(client, CHUNK.chunk_id, OTHER.chunk_id)
    assert (first.data, first.miss) == (None, MissReason.DIGEST), lie
    assert second.data == OTHER.data


@LIES
async def test_bytes_that_somebody_takes_as_they_come_are_checked_frame_by_frame_and_at_the_end(
    channels: ChannelPool, lie: str, responses: list[GetResponse]
) -> None:
    honest = [answer(OTHER, index=1), *frames_of(OTHER.data)]
    came: dict[int, bytearray] = {0: bytearray(), 1: bytearray()}

    def take(index: int, info: ObjectInfo, offset: int, data: memoryview) -> None:
        assert offset == len(came[index]), "in order and without a gap"
        came[index] += data

    async with lying_store([*responses, *honest]) as server:
        client = StoreClient(channels, lambda: stores_at(server.address))
        ids = (CHUNK.chunk_id, OTHER.chunk_id)
        got = client.get(TENANT, ids, FINGERPRINT, CODECS, soon(), on_bytes=take)
        first, second = [chunk async for chunk in got]
    assert (first.data, first.miss) == (None, MissReason.DIGEST), lie
    assert CHUNK.data.startswith(came[0]) or came[0] == REHASHED, "no byte of a frame that was damaged"
    assert (second.data, second.miss, came[1]) == (None, None, OTHER.data), "nobody else keeps them"


async def test_bytes_that_are_no_message_are_an_error(channels: ChannelPool) -> None:
    async def garbage(request: bytes, context: object) -> AsyncIterator[bytes]:
        yield b"\x12\xff"

    server = grpc.aio.server()
    get = {"Get": grpc.unary_stream_rpc_method_handler(garbage)}
    server.add_registered_method_handlers("spolia.v1.KVStoreService", get)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(DataCorrupt, match="no GetResponse"):
            await fetch(StoreClient(channels, lambda: stores_at(f"127.0.0.1:{port}")), CHUNK.chunk_id)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "responses",
    [
        [*FRAMES[:1]],
        [answer(CHUNK, index=1)],
        [answer(CHUNK), *FRAMES, *[answer(CHUNK), *FRAMES]],
        [answer(CHUNK), *FRAMES, answer(OTHER, index=1), answer(OTHER, index=2)],
        [answer(CHUNK), *FRAMES],
        [],
    ],
)
async def test_an_answer_to_another_question_is_an_error(channels: ChannelPool, responses: list[GetResponse]) -> None:
    async with lying_store(responses) as server:
        client = StoreClient(channels, lambda: stores_at(server.address))
        with pytest.raises(DataCorrupt):
            await fetch(client, CHUNK.chunk_id, OTHER.chunk_id)


async def test_a_chunk_is_handed_over_as_soon_as_it_is_whole(channels: ChannelPool) -> None:
    async with lying_store([answer(CHUNK), *FRAMES], and_hang=True) as server:
        client = StoreClient(channels, lambda: stores_at(server.address))
        ids = (CHUNK.chunk_id, OTHER.chunk_id)
        async with aclosing(client.get(TENANT, ids, FINGERPRINT, CODECS, soon())) as chunks:
            assert (await anext(chunks)).data == CHUNK.data


# Failures


async def test_no_address_and_nobody_there_are_unavailable(channels: ChannelPool) -> None:
    with pytest.raises(Unavailable, match="no store is known"):
        await fetch(StoreClient(channels, lambda: []), CHUNK.chunk_id)
    nobody = StoreClient(channels, lambda: stores_at("127.0.0.1:1"))
    with pytest.raises(Unavailable):
        await nobody.lookup(TENANT, [CHUNK.chunk_id], FINGERPRINT, CODECS, soon())
    with pytest.raises(Unavailable):
        await store(nobody, CHUNK)


async def test_a_store_that_is_late_is_deadline_exceeded(channels: ChannelPool) -> None:
    async with lying_store([answer(CHUNK)], and_hang=True) as server:
        client = StoreClient(channels, lambda: stores_at(server.address))
        with pytest.raises(DeadlineExceeded):
            async for _ in client.get(TENANT, [CHUNK.chunk_id], FINGERPRINT, CODECS, Deadline.after(0.2)):
                pass
        with pytest.raises(DeadlineExceeded):
            await client.stats(Deadline.after(0.0))


async def test_a_store_that_dies_mid_get_is_unavailable(node: KVStoreNode, client: StoreClient) -> None:
    await store(client, CHUNK, make_chunk(3, num_tokens=5000, head_dim=256))
    chunks = client.get(TENANT, [CHUNK.chunk_id, (3).to_bytes(32, "big")], FINGERPRINT, CODECS, soon())
    assert (await anext(chunks)).data == CHUNK.data
    await end_at_once(node)
    with pytest.raises(Unavailable):
        await anext(chunks)


async def test_a_call_cancelled_beneath_its_caller_is_unavailable_and_a_cancelled_caller_is_cancelled() -> None:
    async def beneath() -> None:
        with call_errors("host:1"):
            raise asyncio.CancelledError  # what gRPC raises when the channel is closed

    async def waits() -> None:
        with call_errors("host:1"):
            await asyncio.Event().wait()

    with pytest.raises(Unavailable, match="host:1"):
        await beneath()
    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()


async def test_a_store_that_comes_back_is_found_again(channels: ChannelPool, node: KVStoreNode) -> None:
    address = [node.server.address]
    client = StoreClient(channels, lambda: stores_at(address[0]))
    await store(client, CHUNK)
    await end_at_once(node)
    with pytest.raises(Unavailable):
        await fetch(client, CHUNK.chunk_id)
    async with running_store() as another:
        address[0] = another.server.address
        (gone,) = await fetch(client, CHUNK.chunk_id)
        assert gone.miss is MissReason.NOT_FOUND


@pytest.mark.parametrize("leaving", ["close", "cancel"])
async def test_a_reader_that_leaves_early_frees_the_store(node: KVStoreNode, client: StoreClient, leaving: str) -> None:
    big = make_chunk(3, num_tokens=5000, head_dim=256)
    await store(client, CHUNK, big)
    reading = asyncio.Event()

    async def read() -> None:
        ids = (CHUNK.chunk_id, big.chunk_id)
        async with aclosing(client.get(TENANT, ids, FINGERPRINT, CODECS, soon())) as chunks:
            await anext(chunks)
            assert node.store.tiers.num_transfers == 2
            reading.set()
            if leaving == "cancel":
                await anext(chunks)
                await asyncio.Event().wait()

    task = asyncio.create_task(read())
    await asyncio.wait_for(reading.wait(), 10)
    if leaving == "cancel":
        task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled() == (leaving == "cancel")
    await eventually(lambda: node.store.tiers.num_transfers == 0)


async def test_an_upload_that_is_cancelled_frees_the_store(node: KVStoreNode, client: StoreClient) -> None:
    big = make_chunk(3, num_tokens=5000, head_dim=256)
    task = asyncio.create_task(store(client, big))
    await eventually(lambda: node.store.tiers.num_transfers == 1)
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
    await eventually(lambda: node.store.tiers.ram.held_bytes == 0)


# Single flight


def test_the_tests_own_digests_are_right() -> None:
    assert digest(CHUNK.data) == CHUNK.info.digest != digest(REHASHED)
