"""The store over gRPC, spoken to in raw messages: what it refuses, what it streams, what it frees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from captured_logs import captured_logs
from kvstore_calls import (
    BODY,
    CHUNK,
    changed,
    claim,
    frames_of,
    get,
    header_of,
    node,
    read_to_the_end,
    refusal,
    stub,
    upload_of,
)
from kvstore_worlds import (
    FINGERPRINT,
    TENANT,
    damage,
    eventually,
    fresh_id,
    make_big_chunk,
    make_chunk,
    object_of,
    running_node,
)

from spolia.errors import (
    AlreadyStored,
    Busy,
    DataCorrupt,
    DeadlineExceeded,
    InvalidRequest,
    NotSupported,
    error_from_rpc,
)
from spolia.v1 import common_pb2, kvstore_pb2
from spolia.v1.common_pb2 import Frame
from spolia.v1.kvstore_pb2 import PutRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.digests import MAX_FRAME_BYTES, digest
from spolia_kvstore.node import KVStoreNode

__all__ = ["node", "stub"]  # fixtures

# Put


async def test_what_was_put_comes_back_bit_for_bit(stub: KVStoreServiceStub) -> None:
    put = await stub.Put(iter(upload_of(CHUNK, frame_bytes=100)), timeout=10)
    header, *rest = await get(stub, [CHUNK.chunk_id])
    assert b"".join(response.frame.data for response in rest) == CHUNK.data
    assert (header.header.entry.info.replica, header.header.entry.tier) == (put.replica, common_pb2.TIER_RAM)
    assert changed(CHUNK.info, replica=put.replica) == header.header.entry.info


@pytest.mark.parametrize(
    ("field", "requests"),
    [
        ("header", []),
        ("header", BODY),
        ("frame", [header_of(CHUNK.info), header_of(CHUNK.info)]),
        ("frame.offset", [header_of(CHUNK.info), *BODY[1:]]),
        ("frame.offset", [header_of(CHUNK.info), BODY[0], BODY[0]]),
        ("frame.data", [header_of(CHUNK.info), PutRequest(frame=Frame(digest=digest(b"")))]),
        ("frame.data", [*upload_of(CHUNK), PutRequest(frame=Frame(offset=len(CHUNK.data), data=b"x"))]),
        ("info.size_bytes", [header_of(CHUNK.info), *BODY[:-1]]),
        ("info.size_bytes", [header_of(changed(CHUNK.info, size_bytes=1 << 40))]),
        ("tenant_id", [header_of(CHUNK.info, tenant_id="")]),
        ("tenant_id", [header_of(CHUNK.info, tenant_id="x" * 257)]),
        ("info.chunk_id", [header_of(changed(CHUNK.info, chunk_id=b"short"))]),
        ("info.fingerprint", [header_of(changed(CHUNK.info, fingerprint=b"short"))]),
        ("info.digest", [header_of(changed(CHUNK.info, digest=b"short"))]),
        ("info.kind", [header_of(changed(CHUNK.info, kind=9))]),
        ("info.format_version", [header_of(changed(CHUNK.info, format_version=2))]),
        ("info.codec", [header_of(changed(CHUNK.info, codec="zip"))]),
        ("info.chunk_id", [header_of(changed(CHUNK.info, chunk_id=bytes(32))), *BODY]),
        ("info.kind", [header_of(changed(CHUNK.info, kind=2)), *BODY]),
        ("info.fingerprint", [header_of(changed(CHUNK.info, fingerprint=bytes(32))), *BODY]),
        ("info.num_tokens", [header_of(changed(CHUNK.info, num_tokens=9)), *BODY]),
    ],
)
async def test_a_malformed_upload_is_refused_by_field_and_leaves_nothing(
    node: KVStoreNode, stub: KVStoreServiceStub, field: str, requests: list[PutRequest]
) -> None:
    error = await refusal(stub, requests)
    assert isinstance(error, InvalidRequest), error
    assert error.field == field
    await eventually(lambda: node.store.tiers.ram.held_bytes == 0)


async def test_a_frame_larger_than_four_mebibytes_is_refused(stub: KVStoreServiceStub) -> None:
    chunk = make_big_chunk(1)
    error = await refusal(stub, upload_of(chunk, MAX_FRAME_BYTES + 1))
    assert isinstance(error, InvalidRequest)
    assert error.field == "frame.data"
    await stub.Put(iter(upload_of(chunk, MAX_FRAME_BYTES)), timeout=10)


async def test_bytes_that_are_no_chunk_object_are_refused(stub: KVStoreServiceStub) -> None:
    data = b"no object at all"
    info = changed(CHUNK.info, size_bytes=len(data), digest=digest(data))
    error = await refusal(stub, [header_of(info), *frames_of(data)])
    assert isinstance(error, InvalidRequest)
    assert "unreadable" in str(error)


async def test_damage_is_data_loss_whichever_digest_notices(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    damaged = CHUNK.data[:-1] + bytes([CHUNK.data[-1] ^ 1])
    frame_damaged = [header_of(CHUNK.info), PutRequest(frame=Frame(data=damaged, digest=digest(CHUNK.data)))]
    whole_damaged = [header_of(CHUNK.info), *frames_of(damaged)]
    layer_damaged = [header_of(changed(CHUNK.info, digest=digest(damaged))), *frames_of(damaged)]
    with captured_logs() as lines:
        for requests in (frame_damaged, whole_damaged, layer_damaged):
            assert isinstance(await refusal(stub, requests), DataCorrupt)
    noted = [(line["log_level"], line["chunk_id"]) for line in lines if line["event"] == "damaged upload refused"]
    assert noted == [("warning", CHUNK.chunk_id.hex())] * 3
    assert (node.store.counters.digest_failures, len(node.store.tiers.ram)) == (3, 0)


async def test_a_second_put_is_refused_as_soon_as_its_header_is_read(stub: KVStoreServiceStub) -> None:
    await stub.Put(iter(upload_of(CHUNK)), timeout=10)

    async def header_and_silence() -> AsyncIterator[PutRequest]:
        yield header_of(CHUNK.info)
        await asyncio.Event().wait()

    with pytest.raises(grpc.RpcError) as caught:
        await stub.Put(header_and_silence(), timeout=10)
    assert isinstance(error_from_rpc(caught.value), AlreadyStored)


async def test_of_two_uploads_at_once_the_first_to_finish_wins(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    may_go_on = asyncio.Event()

    async def slow() -> AsyncIterator[PutRequest]:
        header, *rest = upload_of(CHUNK, 100)
        yield header
        await may_go_on.wait()
        for request in rest:
            yield request

    late = stub.Put(slow(), timeout=10)
    await eventually(lambda: node.store.tiers.num_transfers == 1)
    await stub.Put(iter(upload_of(CHUNK)), timeout=10)
    may_go_on.set()
    with pytest.raises(grpc.RpcError) as caught:
        await late
    assert isinstance(error_from_rpc(caught.value), AlreadyStored)
    assert node.store.tiers.ram.held_bytes == node.store.tiers.ram.arena.charge(len(CHUNK.data))


async def test_a_disk_this_store_has_not_is_a_failed_precondition(stub: KVStoreServiceStub) -> None:
    error = await refusal(stub, [header_of(CHUNK.info, durability=kvstore_pb2.DURABILITY_DISK)])
    assert isinstance(error, NotSupported)
    assert (error.field, error.actual) == ("durability", "DURABILITY_DISK")


async def test_an_object_without_room_is_refused_with_the_budget_in_the_answer(stub: KVStoreServiceStub) -> None:
    error = await refusal(stub, [header_of(changed(CHUNK.info, size_bytes=33 << 20))])
    assert isinstance(error, Busy)
    assert (error.field, error.limit) == ("info.size_bytes", f"{32 << 20} bytes")


async def test_an_upload_whose_client_vanishes_frees_its_memory(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    async def half() -> AsyncIterator[PutRequest]:
        header, first, *_ = upload_of(CHUNK, 100)
        yield header
        yield first
        await asyncio.Event().wait()

    call = stub.Put(half(), timeout=10)
    await eventually(lambda: node.store.tiers.num_transfers == 1)
    call.cancel()
    await eventually(lambda: node.store.tiers.num_transfers == 0)
    assert node.store.tiers.ram.held_bytes == 0
    assert (await stub.GetStats(kvstore_pb2.GetStatsRequest(), timeout=10)).num_transfers == 0


async def test_an_upload_that_stalls_without_a_deadline_is_ended() -> None:
    async with (
        running_node(rpc_timeout_s=0.2) as node,
        grpc.aio.insecure_channel(node.server.address) as channel,
    ):

        async def header_and_silence() -> AsyncIterator[PutRequest]:
            yield header_of(CHUNK.info)
            await asyncio.Event().wait()

        with pytest.raises(grpc.RpcError) as caught:
            await KVStoreServiceStub(channel).Put(header_and_silence())
        assert isinstance(error_from_rpc(caught.value), DeadlineExceeded)
        assert node.store.tiers.ram.held_bytes == 0


async def test_uploads_evict_the_oldest_and_pins_keep_them(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    chunks = [make_big_chunk(number) for number in range(1, 5)]
    for chunk in chunks[:3]:
        await stub.Put(iter(upload_of(chunk)), timeout=10)
    pin = kvstore_pb2.PinRequest(tenant_id=TENANT, chunk_ids=[chunks[0].chunk_id, fresh_id()], owner="me")
    assert list((await stub.Pin(pin, timeout=10)).pinned) == [True, False]
    await stub.Put(iter(upload_of(chunks[3])), timeout=10)
    headers = [r.header for r in await get(stub, [c.chunk_id for c in chunks]) if r.HasField("header")]
    assert [h.entry.miss for h in headers] == [0, common_pb2.MISS_REASON_NOT_FOUND, 0, 0]
    stats = await stub.GetStats(kvstore_pb2.GetStatsRequest(), timeout=10)
    assert (stats.evictions, stats.num_objects, stats.num_pins, stats.puts) == (1, 3, 1, 4)
    assert (stats.hits, stats.misses, stats.used_bytes) == (3, 1, sum(len(c.data) for c in chunks[:3]))
    unpin = kvstore_pb2.UnpinRequest(tenant_id=TENANT, chunk_ids=[chunks[0].chunk_id], owner="me")
    assert (await stub.Unpin(unpin, timeout=10)).num_unpinned == 1


# Lookup and Get


async def test_answers_come_in_the_order_asked_and_say_why_a_chunk_is_missed(stub: KVStoreServiceStub) -> None:
    other = make_chunk(2, fingerprint=b"o" * 32)
    for chunk in (CHUNK, other):
        await stub.Put(iter(upload_of(chunk)), timeout=10)
    nobody = fresh_id()
    await claim(stub, [nobody], "worker")
    ids = [nobody, other.chunk_id, CHUNK.chunk_id]
    wanted = [common_pb2.MISS_REASON_NOT_FOUND, common_pb2.MISS_REASON_FINGERPRINT, 0]
    request = kvstore_pb2.LookupRequest(tenant_id=TENANT, chunk_ids=ids, fingerprint=FINGERPRINT)
    entries = (await stub.Lookup(request, timeout=10)).entries
    responses = await get(stub, ids, fingerprint=FINGERPRINT)
    headers = [response.header for response in responses if response.HasField("header")]
    assert [entry.miss for entry in entries] == [header.entry.miss for header in headers] == wanted
    assert [entry.HasField("info") for entry in entries] == [False, False, True]
    assert [header.index for header in headers] == [0, 1, 2]
    assert [entry.claimed_by for entry in entries] == ["worker", "", ""]
    assert sum(response.HasField("frame") for response in responses) == 1


async def test_a_codec_the_reader_cannot_read_is_a_miss(stub: KVStoreServiceStub) -> None:
    await stub.Put(iter(upload_of(CHUNK)), timeout=10)
    for accepted, miss in ((["zip"], common_pb2.MISS_REASON_CODEC), (["zip", "raw"], 0), ([], 0)):
        header, *_ = await get(stub, [CHUNK.chunk_id], accepted_codecs=accepted)
        assert header.header.entry.miss == miss


async def test_another_tenants_chunks_are_not_found(stub: KVStoreServiceStub) -> None:
    await stub.Put(iter(upload_of(CHUNK)), timeout=10)
    lookup = kvstore_pb2.LookupRequest(tenant_id="other", chunk_ids=[CHUNK.chunk_id])
    (entry,) = (await stub.Lookup(lookup, timeout=10)).entries
    assert entry.miss == common_pb2.MISS_REASON_NOT_FOUND
    delete = kvstore_pb2.DeleteRequest(tenant_id="other", chunk_ids=[CHUNK.chunk_id])
    assert (await stub.Delete(delete, timeout=10)).num_deleted == 0
    await stub.Put(iter([header_of(CHUNK.info, "other"), *frames_of(CHUNK.data)]), timeout=10)


@pytest.mark.parametrize(
    ("field", "request_fields"),
    [
        ("tenant_id", {"tenant_id": ""}),
        ("chunk_ids", {"chunk_ids": [bytes(32)] * 4097}),
        ("chunk_ids[1]", {"chunk_ids": [bytes(32), bytes(31)]}),
        ("fingerprint", {"fingerprint": b"short"}),
    ],
)
async def test_a_bad_question_is_refused_by_field(
    stub: KVStoreServiceStub, field: str, request_fields: dict[str, object]
) -> None:
    fields = {"tenant_id": TENANT, **request_fields}
    with pytest.raises(grpc.RpcError) as of_lookup:
        await stub.Lookup(kvstore_pb2.LookupRequest(**fields), timeout=10)  # type: ignore[arg-type]  # fields differ in type
    with pytest.raises(grpc.RpcError) as of_get:
        async for _ in stub.Get(kvstore_pb2.GetRequest(**fields), timeout=10):  # type: ignore[arg-type]  # fields differ in type
            pass
    for error in (error_from_rpc(of_lookup.value), error_from_rpc(of_get.value)):
        assert isinstance(error, InvalidRequest)
        assert error.field == field
        assert error.limit


async def test_an_object_deleted_while_it_is_read_is_read_to_its_end(
    node: KVStoreNode, stub: KVStoreServiceStub
) -> None:
    chunk = make_big_chunk(1)
    await stub.Put(iter(upload_of(chunk)), timeout=10)
    responses = stub.Get(kvstore_pb2.GetRequest(tenant_id=TENANT, chunk_ids=[chunk.chunk_id]), timeout=10)
    received = [await responses.read(), await responses.read()]
    delete = kvstore_pb2.DeleteRequest(tenant_id=TENANT, chunk_ids=[chunk.chunk_id])
    deleted = await stub.Delete(delete, timeout=10)
    assert (deleted.num_deleted, deleted.bytes_deleted) == (1, len(chunk.data))
    ram = node.store.tiers.ram
    assert (len(ram), ram.held_bytes) == (0, ram.arena.charge(len(chunk.data)))
    received += await read_to_the_end(responses)
    assert b"".join(response.frame.data for response in received[1:]) == chunk.data
    await eventually(lambda: node.store.tiers.ram.held_bytes == 0)


async def test_a_reader_that_vanishes_frees_what_it_read(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    chunk = make_big_chunk(1)
    await stub.Put(iter(upload_of(chunk)), timeout=10)
    call = stub.Get(kvstore_pb2.GetRequest(tenant_id=TENANT, chunk_ids=[chunk.chunk_id]), timeout=10)
    await call.read()
    assert (await stub.GetStats(kvstore_pb2.GetStatsRequest(), timeout=10)).num_transfers == 1
    call.cancel()
    await eventually(lambda: node.store.tiers.num_transfers == 0)


async def test_a_reader_that_stops_taking_frames_without_a_deadline_is_ended() -> None:
    async with (
        running_node(rpc_timeout_s=1.5) as node,
        grpc.aio.insecure_channel(node.server.address) as channel,
    ):
        chunk, stub = make_big_chunk(1), KVStoreServiceStub(channel)
        await stub.Put(iter(upload_of(chunk)), timeout=10)
        call = stub.Get(kvstore_pb2.GetRequest(tenant_id=TENANT, chunk_ids=[chunk.chunk_id]))
        await call.read()
        await eventually(lambda: node.store.tiers.num_transfers == 0)
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.wait_for(read_to_the_end(call), 10)
        assert isinstance(error_from_rpc(caught.value), DeadlineExceeded)


async def test_bytes_that_rot_in_memory_are_dropped_so_that_they_can_be_stored_again(
    node: KVStoreNode, stub: KVStoreServiceStub
) -> None:
    await stub.Put(iter(upload_of(CHUNK)), timeout=10)
    damage(object_of(node, CHUNK), -1)
    with captured_logs() as lines:
        _, frame = await get(stub, [CHUNK.chunk_id])
    assert digest(frame.frame.data) != frame.frame.digest
    (line,) = [line for line in lines if line["event"] == "bytes changed in memory"]
    assert (line["log_level"], line["chunk_id"]) == ("warning", CHUNK.chunk_id.hex())
    assert (node.store.counters.digest_failures, len(node.store.tiers.ram)) == (1, 0)
    node.store.check_invariants()
    await stub.Put(iter(upload_of(CHUNK)), timeout=10)
