"""KVStoreService: translates between the wire and the store, and decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc

from spolia.v1 import common_pb2, kvstore_pb2, kvstore_pb2_grpc
from spolia_core.errors import DeadlineExceeded, InvalidRequest, SpoliaError
from spolia_kvstore import wire
from spolia_kvstore.object_store import StoredObject
from spolia_kvstore.objects import ObjectRecord
from spolia_kvstore.store import KVStore, Reading
from spolia_node.deadline import Deadline

SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"].full_name
ANSWER_MARGIN = 0.1
"""Share of the caller's time that a waiting Claim leaves for its answer to arrive."""


LEFT_OVER_PAUSE_S = 0.2
MAX_LEFT_OVER_S = 5.0
"""How long a refused upload is read on: until it pauses for the first, at most for the second."""


@dataclass(frozen=True, slots=True)
class LeaseDefaults:
    """What a caller gets that asks for no lease in particular, and how long a call without a deadline may take."""

    claim_ttl_ms: int = 30_000
    pin_lease_ms: int = 60_000
    rpc_timeout_s: float = 30.0


class KVStoreServer(kvstore_pb2_grpc.KVStoreServiceServicer):
    """The service over one `KVStore`. `close` before the server stops, so that no waiting Claim holds it up."""

    def __init__(self, store: KVStore, defaults: LeaseDefaults | None = None) -> None:
        self._store = store
        self._defaults = defaults or LeaseDefaults()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started."""
        kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server(self, server)

    async def close(self) -> None:
        """Ends every waiting Claim with `Unavailable`."""
        self._store.claims.close()

    async def Lookup(self, request: kvstore_pb2.LookupRequest, context: Any) -> kvstore_pb2.LookupResponse:
        """Says what is here for this reader."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        entries = self._store.lookup(keys, wire.reader_of(request))
        return kvstore_pb2.LookupResponse(entries=[wire.entry_message(entry) for entry in entries])

    async def Get(self, request: kvstore_pb2.GetRequest, context: Any) -> AsyncIterator[kvstore_pb2.GetResponse]:
        """Streams objects. All that are here stay open until the stream ends, however it ends."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        reader = wire.reader_of(request)
        deadline = Deadline.of(context, self._defaults.rpc_timeout_s)
        with _ending_at(deadline), self._store.reading(keys, reader) as readings:
            for response in _responses(self._store, readings):
                yield response

    async def Put(
        self, request_iterator: AsyncIterator[kvstore_pb2.PutRequest], context: Any
    ) -> kvstore_pb2.PutResponse:
        """Takes one object; frees what came of it when it is not kept."""
        deadline = Deadline.of(context, self._defaults.rpc_timeout_s)
        requests = aiter(request_iterator)
        try:
            record = await deadline.wait(self._receive(requests), "the upload")
        except SpoliaError:
            await _let_sender_end(requests)
            raise
        return kvstore_pb2.PutResponse(replica=record.replica, tier=common_pb2.TIER_RAM)

    async def Claim(self, request: kvstore_pb2.ClaimRequest, context: Any) -> kvstore_pb2.ClaimResponse:
        """Claims, renews, and waits if asked to."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        ttl_s = wire.lease_s("ttl_ms", request.ttl_ms, self._defaults.claim_ttl_ms, wire.MAX_CLAIM_TTL_MS)
        left_s = Deadline.of(context, self._defaults.rpc_timeout_s).remaining()
        wait_s = min(request.wait_ms / 1000, left_s * (1 - ANSWER_MARGIN))
        results = await self._store.claim(keys, request.owner, ttl_s, wait_s)
        return kvstore_pb2.ClaimResponse(results=[wire.claim_message(result) for result in results])

    async def Unclaim(self, request: kvstore_pb2.UnclaimRequest, context: Any) -> kvstore_pb2.UnclaimResponse:
        """Gives claims back."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        return kvstore_pb2.UnclaimResponse(num_released=self._store.unclaim(keys, request.owner))

    async def Pin(self, request: kvstore_pb2.PinRequest, context: Any) -> kvstore_pb2.PinResponse:
        """Pins or renews."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        lease_s = wire.lease_s("lease_ms", request.lease_ms, self._defaults.pin_lease_ms, wire.MAX_PIN_LEASE_MS)
        return kvstore_pb2.PinResponse(pinned=self._store.pin(keys, request.owner, lease_s))

    async def Unpin(self, request: kvstore_pb2.UnpinRequest, context: Any) -> kvstore_pb2.UnpinResponse:
        """Ends pins."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        return kvstore_pb2.UnpinResponse(num_unpinned=self._store.unpin(keys, request.owner))

    async def Delete(self, request: kvstore_pb2.DeleteRequest, context: Any) -> kvstore_pb2.DeleteResponse:
        """Drops objects."""
        sizes = self._store.delete(wire.keys_of(request.tenant_id, request.chunk_ids))
        return kvstore_pb2.DeleteResponse(num_deleted=len(sizes), bytes_deleted=sum(sizes))

    async def GetStats(self, request: kvstore_pb2.GetStatsRequest, context: Any) -> kvstore_pb2.GetStatsResponse:
        """Counts."""
        objects, counters = self._store.objects, self._store.counters
        return kvstore_pb2.GetStatsResponse(
            num_objects=len(objects),
            used_bytes=objects.resident_bytes,
            budget_bytes=objects.budget_bytes,
            num_pins=self._store.num_pins,
            num_claims=self._store.claims.num_live(),
            num_transfers=objects.num_transfers,
            hits=counters.hits,
            misses=counters.misses,
            evictions=counters.evictions,
            digest_failures=counters.digest_failures,
            puts=counters.puts,
        )

    async def _receive(self, requests: AsyncIterator[kvstore_pb2.PutRequest]) -> ObjectRecord:
        header = _header_of(await anext(requests, None))
        record = wire.record_of(header)
        upload = self._store.begin_put(record, header.claim_owner)
        try:
            async for request in requests:
                frame = _frame_of(request)
                self._store.append_frame(upload, frame.offset, frame.data, frame.digest)
            return await self._store.finish_put(upload, record)
        finally:
            self._store.abort_put(upload)


def _responses(store: KVStore, readings: Sequence[Reading]) -> Iterator[kvstore_pb2.GetResponse]:
    for index, reading in enumerate(readings):
        header = kvstore_pb2.GetHeader(index=index, entry=wire.entry_message(reading.entry))
        yield kvstore_pb2.GetResponse(header=header)
        if reading.stored is not None:
            yield from _frames(store, reading.stored)


def _frames(store: KVStore, stored: StoredObject) -> Iterator[kvstore_pb2.GetResponse]:
    offset = 0
    for index, frame_digest in enumerate(stored.frame_digests):
        store.check_memory(stored, index)
        data = bytes(stored.frame(index))
        yield kvstore_pb2.GetResponse(frame=common_pb2.Frame(offset=offset, data=data, digest=frame_digest))
        offset += len(data)


async def _let_sender_end(requests: AsyncIterator[kvstore_pb2.PutRequest]) -> None:
    """Reads what is still on its way and drops it, while it comes without a pause.

    An answer given in the middle of an upload can be lost: the sender's next write fails, and gRPC reports that failure
    (INTERNAL) in place of the status that was about to arrive.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(MAX_LEFT_OVER_S):
            while True:
                async with asyncio.timeout(LEFT_OVER_PAUSE_S):
                    if await anext(requests, None) is None:
                        return


def _header_of(request: kvstore_pb2.PutRequest | None) -> kvstore_pb2.PutHeader:
    if request is None or not request.HasField("header"):
        raise InvalidRequest("the first message of Put must be the header", field="header", limit="first message")
    return request.header


def _frame_of(request: kvstore_pb2.PutRequest) -> common_pb2.Frame:
    if not request.HasField("frame"):
        raise InvalidRequest("after its header, Put takes frames only", field="frame", limit="every later message")
    return request.frame


@contextmanager
def _ending_at(deadline: Deadline) -> Iterator[None]:
    """Ends the call around it at `deadline`: gRPC would wait without end for a reader that stopped taking frames.

    The block is a response generator, so the cancel arrives where it is suspended, as GeneratorExit.
    """
    task = asyncio.current_task()
    assert task is not None
    has_fired = False

    def fire() -> None:
        nonlocal has_fired
        has_fired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(deadline.remaining(), fire)
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        if not has_fired:
            raise
        task.uncancel()
        raise DeadlineExceeded("the reader did not take the objects in time") from None
    finally:
        timer.cancel()
