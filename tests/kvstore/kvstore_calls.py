"""A store over gRPC, and what is said to it in raw messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

import grpc
import pytest
from kvstore_worlds import (
    TENANT,
    Chunk,
    make_chunk,
    running_node,
)

from spolia.errors import (
    SpoliaError,
    error_from_rpc,
)
from spolia.v1 import kvstore_pb2
from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.kvstore_pb2 import PutHeader, PutRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.digests import frames
from spolia_kvstore.node import KVStoreNode

GetCall = grpc.aio.UnaryStreamCall[kvstore_pb2.GetRequest, kvstore_pb2.GetResponse]
CHUNK = make_chunk(1)
STORED, GRANTED, HELD = (
    kvstore_pb2.CLAIM_STATE_STORED,
    kvstore_pb2.CLAIM_STATE_GRANTED,
    kvstore_pb2.CLAIM_STATE_HELD,
)


@pytest.fixture
async def node() -> AsyncIterator[KVStoreNode]:
    async with running_node(budget_bytes=32 << 20) as running:
        yield running
        running.store.check_invariants()


@pytest.fixture
async def stub(node: KVStoreNode) -> AsyncIterator[KVStoreServiceStub]:
    options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)]
    async with grpc.aio.insecure_channel(node.server.address, options=options) as channel:
        yield KVStoreServiceStub(channel)


def changed(info: ObjectInfo, **changes: object) -> ObjectInfo:
    copy = ObjectInfo()
    copy.CopyFrom(info)
    copy.MergeFrom(ObjectInfo(**changes))  # type: ignore[arg-type]  # fields differ in type
    return copy


def header_of(info: ObjectInfo, tenant_id: str = TENANT, **more: object) -> PutRequest:
    return PutRequest(header=PutHeader(tenant_id=tenant_id, info=info, **more))  # type: ignore[arg-type]  # fields differ in type


def frames_of(data: bytes, frame_bytes: int = 1 << 20) -> Iterator[PutRequest]:
    for offset, piece, piece_digest in frames(data, frame_bytes):
        yield PutRequest(frame=Frame(offset=offset, data=piece, digest=piece_digest))


def upload_of(chunk: Chunk, frame_bytes: int = 1 << 20) -> list[PutRequest]:
    return [header_of(chunk.info), *frames_of(chunk.data, frame_bytes)]


async def refusal(stub: KVStoreServiceStub, requests: Iterable[PutRequest]) -> SpoliaError:
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Put(iter(list(requests)), timeout=10)
    return error_from_rpc(caught.value)


async def get(stub: KVStoreServiceStub, ids: list[bytes], **more: object) -> list[kvstore_pb2.GetResponse]:
    request = kvstore_pb2.GetRequest(tenant_id=TENANT, chunk_ids=ids, **more)  # type: ignore[arg-type]  # fields differ in type
    return [response async for response in stub.Get(request, timeout=10)]


async def read_to_the_end(call: GetCall) -> list[kvstore_pb2.GetResponse]:
    received = []
    while (response := await call.read()) is not grpc.aio.EOF:
        received.append(response)
    return received


async def claim(stub: KVStoreServiceStub, ids: list[bytes], owner: str, **more: int) -> list[int]:
    request = kvstore_pb2.ClaimRequest(tenant_id=TENANT, chunk_ids=ids, owner=owner, **more)
    return [result.state for result in (await stub.Claim(request, timeout=20)).results]


BODY = list(frames_of(CHUNK.data, 100))
