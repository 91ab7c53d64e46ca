"""What is wrong is told by status and field, and leaves nothing: no bytes, no files, no rows, no leases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from kvstore_worlds import TENANT, Chunk, eventually, make_chunk, running_node

from spolia.v1 import kvstore_pb2
from spolia.v1.common_pb2 import MISS_REASON_NOT_FOUND, Frame
from spolia.v1.kvstore_pb2 import CLAIM_STATE_GRANTED, DURABILITY_DISK, PutHeader, PutRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.digests import MAX_FRAME_BYTES, digest, frames
from spolia_kvstore.node import KVStoreNode
from spolia_node.channels import channel_options

CHUNK = make_chunk(1, num_tokens=64)
CODE = grpc.StatusCode
LIMIT_BYTES = 1 << 20
Spoil = Callable[[list[PutRequest]], object]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[KVStoreNode]:
    settings = {"data_dir": tmp_path / "data", "budget_bytes": 8 << 20, "max_object_bytes": LIMIT_BYTES}
    async with running_node(**settings) as running:
        yield running


@pytest.fixture
async def stub(node: KVStoreNode) -> AsyncIterator[KVStoreServiceStub]:
    async with grpc.aio.insecure_channel(node.server.address, options=channel_options(16 << 20)) as channel:
        yield KVStoreServiceStub(channel)


def upload(chunk: Chunk = CHUNK, tenant_id: str = TENANT) -> list[PutRequest]:
    header = PutRequest(header=PutHeader(tenant_id=tenant_id, info=chunk.info, durability=DURABILITY_DISK))
    pieces = [Frame(offset=at, data=data, digest=found) for at, data, found in frames(chunk.data, 4096)]
    return [header, *(PutRequest(frame=piece) for piece in pieces)]


async def status_of(stub: KVStoreServiceStub, requests: list[PutRequest]) -> grpc.StatusCode:
    try:
        await stub.Put(iter(requests), timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return CODE.OK


async def answered(call: Any) -> None:
    """Awaits a call, or the first message of its stream."""
    await (anext(aiter(call)) if hasattr(call, "__aiter__") else call)


async def assert_nothing_is_kept(node: KVStoreNode) -> None:
    await eventually(lambda: node.store.tiers.num_transfers == 0 and node.store.tiers.ram.held_bytes == 0)
    disk = node.store.tiers.disk
    assert disk is not None
    assert (node.store.num_objects, len(disk), list(disk.files.scan())) == (0, 0, [])
    assert list((disk.files.root / "tmp").iterdir()) == []
    node.store.check_invariants()


def swap_frames(requests: list[PutRequest]) -> None:
    requests[1], requests[2] = requests[2], requests[1]


def repeat_frame(requests: list[PutRequest]) -> None:
    requests.insert(2, requests[1])


def leave_frame_out(requests: list[PutRequest]) -> None:
    del requests[2]


def cut_short(requests: list[PutRequest]) -> None:
    del requests[-1]


def go_on(requests: list[PutRequest]) -> None:
    requests.append(PutRequest(frame=Frame(offset=len(CHUNK.data), data=b"x", digest=digest(b"x"))))


def empty_frame(requests: list[PutRequest]) -> None:
    requests.insert(1, PutRequest(frame=Frame(offset=0, data=b"", digest=digest(b""))))


def long_frame(requests: list[PutRequest]) -> None:
    data = bytes(MAX_FRAME_BYTES + 1)
    requests[1] = PutRequest(frame=Frame(offset=0, data=data, digest=digest(data)))


def flip_bit(requests: list[PutRequest]) -> None:
    data = bytearray(requests[3].frame.data)
    data[7] ^= 4
    requests[3].frame.data = bytes(data)


def flip_digest(requests: list[PutRequest]) -> None:
    requests[3].frame.digest = digest(b"something else")


def announce_another_digest(requests: list[PutRequest]) -> None:
    requests[0].header.info.digest = digest(b"something else")


def announce_another_chunk(requests: list[PutRequest]) -> None:
    requests[0].header.info.chunk_id = bytes(32)


def announce_more(requests: list[PutRequest]) -> None:
    requests[0].header.info.size_bytes += 1


def announce_too_much(requests: list[PutRequest]) -> None:
    requests[0].header.info.size_bytes = LIMIT_BYTES + 1


def negative_cost(requests: list[PutRequest]) -> None:
    requests[0].header.info.compute_s = -1.0


def cost_that_is_no_number(requests: list[PutRequest]) -> None:
    requests[0].header.info.compute_s = float("nan")


def no_header(requests: list[PutRequest]) -> None:
    del requests[0]


def two_headers(requests: list[PutRequest]) -> None:
    requests.insert(1, requests[0])


def unknown_durability(requests: list[PutRequest]) -> None:
    requests[0].header.durability = 9  # type: ignore[assignment]  # no such durability


def no_tenant(requests: list[PutRequest]) -> None:
    requests[0].header.tenant_id = ""


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (swap_frames, CODE.INVALID_ARGUMENT),
        (repeat_frame, CODE.INVALID_ARGUMENT),
        (leave_frame_out, CODE.INVALID_ARGUMENT),
        (cut_short, CODE.INVALID_ARGUMENT),
        (go_on, CODE.INVALID_ARGUMENT),
        (empty_frame, CODE.INVALID_ARGUMENT),
        (long_frame, CODE.INVALID_ARGUMENT),
        (flip_bit, CODE.DATA_LOSS),
        (flip_digest, CODE.DATA_LOSS),
        (announce_another_digest, CODE.DATA_LOSS),
        (announce_another_chunk, CODE.INVALID_ARGUMENT),
        (announce_more, CODE.INVALID_ARGUMENT),
        (announce_too_much, CODE.INVALID_ARGUMENT),
        (negative_cost, CODE.INVALID_ARGUMENT),
        (cost_that_is_no_number, CODE.INVALID_ARGUMENT),
        (no_header, CODE.INVALID_ARGUMENT),
        (two_headers, CODE.INVALID_ARGUMENT),
        (unknown_durability, CODE.FAILED_PRECONDITION),
        (no_tenant, CODE.INVALID_ARGUMENT),
    ],
)
async def test_a_bad_upload_has_a_precise_status_and_leaves_nothing(
    node: KVStoreNode, stub: KVStoreServiceStub, spoil: Spoil, code: grpc.StatusCode
) -> None:
    requests = upload()
    spoil(requests)
    assert await status_of(stub, requests) is code
    await assert_nothing_is_kept(node)
    assert await status_of(stub, upload()) is CODE.OK, "the good upload behind it is taken"


@pytest.mark.parametrize("call", ["Lookup", "Get", "Pin", "Unpin", "Delete", "Claim", "Unclaim", "Verify"])
@pytest.mark.parametrize("bad", [b"", b"short", bytes(33)])
async def test_an_id_that_is_none_is_refused_by_every_call(stub: KVStoreServiceStub, call: str, bad: bytes) -> None:
    more = {"owner": "me"} if call in ("Pin", "Unpin", "Claim", "Unclaim") else {}
    request = getattr(kvstore_pb2, f"{call}Request")(tenant_id=TENANT, chunk_ids=[CHUNK.chunk_id, bad], **more)
    with pytest.raises(grpc.RpcError) as caught:
        await answered(getattr(stub, call)(request, timeout=20))
    assert caught.value.code() is CODE.INVALID_ARGUMENT


async def test_another_tenants_id_is_not_found_and_nothing_done_under_it_touches_the_object(
    node: KVStoreNode, stub: KVStoreServiceStub
) -> None:
    assert await status_of(stub, upload()) is CODE.OK
    theirs = {"tenant_id": "other", "chunk_ids": [CHUNK.chunk_id]}
    (entry,) = (await stub.Lookup(kvstore_pb2.LookupRequest(**theirs), timeout=20)).entries
    assert (entry.miss, entry.HasField("info"), entry.claimed_by) == (MISS_REASON_NOT_FOUND, False, "")
    (got,) = [each async for each in stub.Get(kvstore_pb2.GetRequest(**theirs), timeout=20)]
    assert got.header.entry.miss == MISS_REASON_NOT_FOUND
    assert not (await stub.Pin(kvstore_pb2.PinRequest(owner="me", **theirs), timeout=20)).pinned[0]
    assert (await stub.Delete(kvstore_pb2.DeleteRequest(**theirs), timeout=20)).num_deleted == 0
    (claim,) = (await stub.Claim(kvstore_pb2.ClaimRequest(owner="me", **theirs), timeout=20)).results
    assert claim.state == CLAIM_STATE_GRANTED
    (mine,) = (await stub.Lookup(kvstore_pb2.LookupRequest(tenant_id=TENANT, chunk_ids=[CHUNK.chunk_id]))).entries
    assert mine.HasField("info")
    assert node.store.num_objects == 1
    await stub.Unclaim(kvstore_pb2.UnclaimRequest(owner="me", **theirs), timeout=20)


async def test_unknown_ids_are_misses_and_calls_about_them_change_nothing(
    node: KVStoreNode, stub: KVStoreServiceStub
) -> None:
    ids = {"tenant_id": TENANT, "chunk_ids": [bytes(32)]}
    assert (await stub.Pin(kvstore_pb2.PinRequest(owner="me", **ids), timeout=20)).pinned == [False]
    assert (await stub.Unpin(kvstore_pb2.UnpinRequest(owner="me", **ids), timeout=20)).num_unpinned == 0
    assert (await stub.Unclaim(kvstore_pb2.UnclaimRequest(owner="me", **ids), timeout=20)).num_released == 0
    assert (await stub.Delete(kvstore_pb2.DeleteRequest(**ids), timeout=20)).num_deleted == 0
    *_, last = [each async for each in stub.Verify(kvstore_pb2.VerifyRequest(**ids), timeout=20)]
    assert (last.done, last.num_checked) == (True, 0)
    await assert_nothing_is_kept(node)


async def test_a_lease_that_ran_out_is_over_for_its_owner_too(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    assert await status_of(stub, upload()) is CODE.OK
    pinned = {"tenant_id": TENANT, "chunk_ids": [CHUNK.chunk_id], "owner": "me"}
    claimed = {"tenant_id": TENANT, "chunk_ids": [bytes(32)], "owner": "me"}
    await stub.Pin(kvstore_pb2.PinRequest(lease_ms=1, **pinned), timeout=20)
    await stub.Claim(kvstore_pb2.ClaimRequest(ttl_ms=1, **claimed), timeout=20)
    await eventually(lambda: node.store.pins.num_live == node.store.claims.num_live() == 0)
    assert (await stub.Unpin(kvstore_pb2.UnpinRequest(**pinned), timeout=20)).num_unpinned == 0
    assert (await stub.Unclaim(kvstore_pb2.UnclaimRequest(**claimed), timeout=20)).num_released == 0
    claimed["owner"] = "you"
    (claim,) = (await stub.Claim(kvstore_pb2.ClaimRequest(**claimed), timeout=20)).results
    assert claim.state == CLAIM_STATE_GRANTED


@pytest.mark.parametrize(
    ("call", "field", "value"),
    [("Pin", "lease_ms", 3_600_001), ("Claim", "ttl_ms", 600_001), ("Pin", "owner", ""), ("Claim", "owner", "x" * 257)],
)
async def test_leases_and_owners_past_their_limits_are_refused(
    node: KVStoreNode, stub: KVStoreServiceStub, call: str, field: str, value: object
) -> None:
    fields = {"tenant_id": TENANT, "chunk_ids": [bytes(32)], "owner": "me", field: value}
    with pytest.raises(grpc.RpcError) as caught:
        await getattr(stub, call)(getattr(kvstore_pb2, f"{call}Request")(**fields), timeout=20)
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert (node.store.pins.num_live, node.store.claims.num_live()) == (0, 0)
