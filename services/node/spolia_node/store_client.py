"""Chunk objects from a node's side: the store's RPCs as calls with a deadline, and bytes checked on arrival."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.kvstore_pb2 import (
    ClaimRequest,
    ClaimResult,
    DeleteRequest,
    DeleteResponse,
    GetHeader,
    GetRequest,
    GetResponse,
    GetStatsRequest,
    GetStatsResponse,
    LookupEntry,
    LookupRequest,
    PinRequest,
    PutHeader,
    PutRequest,
    PutResponse,
    UnclaimRequest,
    UnpinRequest,
)
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.digests import digest, frames
from spolia_core.errors import DataCorrupt, Unavailable
from spolia_core.reuse import MissReason
from spolia_node.calls import call_errors
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline

if TYPE_CHECKING:
    from spolia.v1.kvstore_pb2_grpc import KVStoreServiceAsyncStub  # a name for types, absent at run time

Data = bytes | bytearray | memoryview
GetCall = grpc.aio.UnaryStreamCall[GetRequest, GetResponse]


@dataclass(frozen=True, slots=True)
class FetchedChunk:
    """One chunk of a Get: its checked bytes, which the caller owns, or why it is missed. Exactly one of the two is set.

    `index` counts in the ids asked for. After a DIGEST miss `entry.info` still says what was announced.
    """

    index: int
    chunk_id: bytes
    entry: LookupEntry
    data: bytearray | None
    miss: MissReason | None


class StoreClient:
    """Calls the store at whatever address `address_source` says now.

    Every call raises `Unavailable` when there is no address or the store cannot be reached or dies, `DeadlineExceeded`
    when it is late, and what the store itself raised.
    """

    def __init__(self, channels: ChannelPool, address_source: Callable[[], str | None]) -> None:
        self._channels = channels
        self._address_source = address_source

    async def lookup(
        self, tenant_id: str, ids: Sequence[bytes], fingerprint: bytes, codecs: Sequence[str], deadline: Deadline
    ) -> list[LookupEntry]:
        """One entry per id, in order: `info` when this reader can have it, else `miss`, and who computes it now."""
        request = LookupRequest(tenant_id=tenant_id, chunk_ids=ids, fingerprint=fingerprint, accepted_codecs=codecs)
        with self._stub(deadline) as stub:
            response = await stub.Lookup(request, timeout=deadline.remaining())
        return list(response.entries)

    async def get(
        self, tenant_id: str, ids: Sequence[bytes], fingerprint: bytes, codecs: Sequence[str], deadline: Deadline
    ) -> AsyncGenerator[FetchedChunk, None]:
        """Yields one item per id, in order, each as soon as it is whole. Closing the iterator ends the call.

        Bytes that do not match a digest, an offset or the announced length are a DIGEST miss; the others go on.
        """
        request = GetRequest(tenant_id=tenant_id, chunk_ids=ids, fingerprint=fingerprint, accepted_codecs=codecs)
        with self._stub(deadline) as stub:
            call = stub.Get(request, timeout=deadline.remaining())
            try:
                async for chunk in _fetched(call, ids):
                    yield chunk
            finally:
                call.cancel()

    async def put(
        self, tenant_id: str, info: ObjectInfo, data: Data, deadline: Deadline, claim_owner: str = ""
    ) -> PutResponse:
        """Stores an object in RAM and ends the claim on it. `data` must not change until this returns.

        Raises `AlreadyStored` when another replica was first: nothing to do. `Busy` when there is no room.
        """
        header = PutHeader(tenant_id=tenant_id, info=info, claim_owner=claim_owner)
        with self._stub(deadline) as stub:
            return await stub.Put(_put_requests(header, data), timeout=deadline.remaining())

    async def claim(
        self,
        tenant_id: str,
        ids: Sequence[bytes],
        owner: str,
        deadline: Deadline,
        *,
        ttl_ms: int = 0,
        wait_ms: int = 0,
    ) -> list[ClaimResult]:
        """Claims the computation of chunks; one result per id. Renews what `owner` holds. 0 `ttl_ms`: the default.

        With `wait_ms`, and nothing newly granted, returns once one of the held ids changed, or HELD when time is up.
        """
        request = ClaimRequest(tenant_id=tenant_id, chunk_ids=ids, owner=owner, ttl_ms=ttl_ms, wait_ms=wait_ms)
        with self._stub(deadline) as stub:
            response = await stub.Claim(request, timeout=deadline.remaining())
        return list(response.results)

    async def unclaim(self, tenant_id: str, ids: Sequence[bytes], owner: str, deadline: Deadline) -> int:
        """Gives claims back without a put; how many ended."""
        request = UnclaimRequest(tenant_id=tenant_id, chunk_ids=ids, owner=owner)
        with self._stub(deadline) as stub:
            return (await stub.Unclaim(request, timeout=deadline.remaining())).num_released

    async def pin(
        self, tenant_id: str, ids: Sequence[bytes], owner: str, deadline: Deadline, *, lease_ms: int = 0
    ) -> list[bool]:
        """Keeps objects from eviction; false for those not here. 0 `lease_ms`: the store's default."""
        request = PinRequest(tenant_id=tenant_id, chunk_ids=ids, owner=owner, lease_ms=lease_ms)
        with self._stub(deadline) as stub:
            return list((await stub.Pin(request, timeout=deadline.remaining())).pinned)

    async def unpin(self, tenant_id: str, ids: Sequence[bytes], owner: str, deadline: Deadline) -> int:
        """Ends pins; how many ended."""
        request = UnpinRequest(tenant_id=tenant_id, chunk_ids=ids, owner=owner)
        with self._stub(deadline) as stub:
            return (await stub.Unpin(request, timeout=deadline.remaining())).num_unpinned

    async def delete(self, tenant_id: str, ids: Sequence[bytes], deadline: Deadline) -> DeleteResponse:
        """Drops objects, pinned or not; says how many, and their bytes."""
        request = DeleteRequest(tenant_id=tenant_id, chunk_ids=ids)
        with self._stub(deadline) as stub:
            return await stub.Delete(request, timeout=deadline.remaining())

    async def stats(self, deadline: Deadline) -> GetStatsResponse:
        """Counts of the whole store, all tenants together."""
        with self._stub(deadline) as stub:
            return await stub.GetStats(GetStatsRequest(), timeout=deadline.remaining())

    @contextmanager
    def _stub(self, deadline: Deadline) -> Iterator[KVStoreServiceAsyncStub]:
        deadline.check("the call to the store")
        address = self._address_source()
        if not address:
            raise Unavailable("no store is known")
        with call_errors(address):
            yield KVStoreServiceStub(self._channels.get(address))


async def _put_requests(header: PutHeader, data: Data) -> AsyncIterator[PutRequest]:
    yield PutRequest(header=header)
    for offset, piece, piece_digest in frames(data):
        yield PutRequest(frame=Frame(offset=offset, data=piece, digest=piece_digest))


class _Arrival:
    """An object on its way in. Keeps taking frames after damage, so that the objects behind it are still read."""

    def __init__(self, header: GetHeader, chunk_id: bytes) -> None:
        info = header.entry.info
        self._header = header
        self._chunk_id = chunk_id
        self._is_intact = info.chunk_id == chunk_id
        self._num_received = 0
        self._data = bytearray()
        try:
            self._data = bytearray(info.size_bytes)
        except (MemoryError, OverflowError):
            self._is_intact = False  # no object is that large

    @property
    def is_whole(self) -> bool:
        """Whether every announced byte has come, undamaged as far as frames tell."""
        return self._is_intact and self._num_received == len(self._data)

    def take(self, frame: Frame) -> None:
        """Copies a frame into place, or notes that the object is damaged."""
        end = self._num_received + len(frame.data)
        fits = self._is_intact and frame.offset == self._num_received and end <= len(self._data)
        if fits and digest(frame.data) == frame.digest:
            memoryview(self._data)[self._num_received : end] = frame.data
            self._num_received = end
        else:
            self._is_intact = False

    def finished(self) -> FetchedChunk:
        """The chunk, whole and checked, or a miss."""
        index, entry = self._header.index, self._header.entry
        if self.is_whole and digest(self._data) == entry.info.digest:
            return FetchedChunk(index, self._chunk_id, entry, self._data, None)
        return FetchedChunk(index, self._chunk_id, entry, None, MissReason.DIGEST)


async def _fetched(call: GetCall, ids: Sequence[bytes]) -> AsyncIterator[FetchedChunk]:
    arrival: _Arrival | None = None
    num_headers = 0
    async for response in call:
        if response.HasField("frame"):
            if arrival is None:
                raise DataCorrupt("the store sent a frame that belongs to no object")
            arrival.take(response.frame)
        else:
            if arrival is not None:
                yield arrival.finished()  # cut short
            index = _checked_index(response.header, num_headers, len(ids))
            num_headers += 1
            arrival = _Arrival(response.header, ids[index]) if response.header.entry.HasField("info") else None
            if arrival is None:
                yield _missed(response.header, ids[index])
        if arrival is not None and arrival.is_whole:
            yield arrival.finished()
            arrival = None
    if arrival is not None:
        yield arrival.finished()
    if num_headers != len(ids):
        raise DataCorrupt(f"the store answered {num_headers} of {len(ids)} chunks")


def _checked_index(header: GetHeader, expected: int, num_ids: int) -> int:
    if header.index != expected or expected >= num_ids:
        raise DataCorrupt(f"the store answered chunk {header.index} where {expected} of {num_ids} was due")
    return expected


def _missed(header: GetHeader, chunk_id: bytes) -> FetchedChunk:
    reasons = {reason.value for reason in MissReason}
    reason = MissReason(header.entry.miss) if header.entry.miss in reasons else MissReason.NOT_FOUND
    return FetchedChunk(header.index, chunk_id, header.entry, None, reason)
