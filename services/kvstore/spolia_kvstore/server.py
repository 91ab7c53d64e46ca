"""KVStoreService: translates between the wire and the store, and decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc

from spolia.v1 import common_pb2, kvstore_pb2, kvstore_pb2_grpc
from spolia_core.errors import DeadlineExceeded, InvalidRequest, SpoliaError
from spolia_core.field_checks import check_field
from spolia_core.ids import ID_BYTES
from spolia_kvstore import wire
from spolia_kvstore.housekeeping import Housekeeping
from spolia_kvstore.limits import MAX_CLAIM_TTL_MS, MAX_PIN_LEASE_MS
from spolia_kvstore.objects import ObjectRecord
from spolia_kvstore.reading import Reading
from spolia_kvstore.stats import stats_message
from spolia_kvstore.store import KVStore
from spolia_node.deadline import Deadline
from spolia_node.frame_messages import ReceivedFrame, frame_message, read_put, serialized
from spolia_node.tracing import current_span

SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"].full_name
ANSWER_MARGIN = 0.1
"""Share of the caller's time that a waiting Claim leaves for its answer to arrive."""

LISTED_AT_ONCE = 256
PROGRESS_EVERY = 32
"""Copies checked between two messages of Verify."""

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

    def __init__(
        self,
        store: KVStore,
        housekeeping: Housekeeping,
        check_accepting: Callable[[], None],
        defaults: LeaseDefaults | None = None,
    ) -> None:
        """`check_accepting` raises while the node drains."""
        self._store = store
        self._housekeeping = housekeeping
        self._check_accepting = check_accepting
        self._defaults = defaults or LeaseDefaults()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started."""
        kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server(self, server)
        # In place of the generated handlers of what moves frames, which make each a message. The last ones count.
        get = grpc.unary_stream_rpc_method_handler(self.Get, kvstore_pb2.GetRequest.FromString, serialized)
        put = grpc.stream_unary_rpc_method_handler(self.Put, read_put, kvstore_pb2.PutResponse.SerializeToString)
        server.add_registered_method_handlers(SERVICE, {"Get": get, "Put": put})

    async def close(self) -> None:
        """Ends every waiting Claim with `Unavailable`."""
        self._store.claims.close()

    async def Lookup(self, request: kvstore_pb2.LookupRequest, context: Any) -> kvstore_pb2.LookupResponse:
        """Says what is here for this reader."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        entries = await self._store.lookup(keys, wire.reader_of(request))
        num_hits = sum(entry.record is not None for entry in entries)
        current_span().set(num_chunks=len(entries), num_hits=num_hits)
        return kvstore_pb2.LookupResponse(entries=[wire.entry_message(entry) for entry in entries])

    async def Get(self, request: kvstore_pb2.GetRequest, context: Any) -> AsyncIterator[Any]:
        """Streams objects, for `serialized`. All that are here stay open until the stream ends, however it ends."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        reader = wire.reader_of(request)
        deadline = Deadline.of(context, self._defaults.rpc_timeout_s)
        with _ending_at(deadline):
            async with self._store.reading(keys, reader) as readings:
                async for response in _responses(self._store, readings):
                    yield response

    async def Put(
        self, request_iterator: AsyncIterator[ReceivedFrame | kvstore_pb2.PutRequest], context: Any
    ) -> kvstore_pb2.PutResponse:
        """Takes one object; frees what came of it when it is not kept."""
        deadline = Deadline.of(context, self._defaults.rpc_timeout_s)
        requests = aiter(request_iterator)
        try:
            self._check_accepting()
            return await deadline.wait(self._receive(requests), "the upload")
        except SpoliaError:
            await _let_sender_end(requests)
            raise

    async def Claim(self, request: kvstore_pb2.ClaimRequest, context: Any) -> kvstore_pb2.ClaimResponse:
        """Claims, renews, and waits if asked to."""
        self._check_accepting()
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        ttl_s = wire.lease_s("ttl_ms", request.ttl_ms, self._defaults.claim_ttl_ms, MAX_CLAIM_TTL_MS)
        left_s = Deadline.of(context, self._defaults.rpc_timeout_s).remaining()
        wait_s = min(request.wait_ms / 1000, left_s * (1 - ANSWER_MARGIN))
        results = await self._store.claim(keys, request.owner, ttl_s, wait_s)
        return kvstore_pb2.ClaimResponse(results=[wire.claim_message(result) for result in results])

    async def Unclaim(self, request: kvstore_pb2.UnclaimRequest, context: Any) -> kvstore_pb2.UnclaimResponse:
        """Gives claims back."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        return kvstore_pb2.UnclaimResponse(num_released=await self._store.unclaim(keys, request.owner))

    async def Pin(self, request: kvstore_pb2.PinRequest, context: Any) -> kvstore_pb2.PinResponse:
        """Pins or renews."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        lease_s = wire.lease_s("lease_ms", request.lease_ms, self._defaults.pin_lease_ms, MAX_PIN_LEASE_MS)
        return kvstore_pb2.PinResponse(pinned=self._store.pin(keys, request.owner, lease_s))

    async def Unpin(self, request: kvstore_pb2.UnpinRequest, context: Any) -> kvstore_pb2.UnpinResponse:
        """Ends pins."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        wire.check_name(request.owner, "owner")
        return kvstore_pb2.UnpinResponse(num_unpinned=self._store.unpin(keys, request.owner))

    async def Delete(self, request: kvstore_pb2.DeleteRequest, context: Any) -> kvstore_pb2.DeleteResponse:
        """Drops objects."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids)
        return wire.dropped_message(await self._store.delete(keys))

    async def GetStats(self, request: kvstore_pb2.GetStatsRequest, context: Any) -> kvstore_pb2.GetStatsResponse:
        """Counts."""
        return stats_message(self._store)

    async def List(self, request: kvstore_pb2.ListRequest, context: Any) -> AsyncIterator[kvstore_pb2.ListResponse]:
        """Lists what is here."""
        size = len(request.id_prefix)
        check_field(size <= ID_BYTES, "id_prefix", f"at most {ID_BYTES} bytes", f"{size} bytes")
        listed = self._housekeeping.list(request.tenant_id, request.id_prefix, request.limit)
        with _ending_at(Deadline.of(context, self._defaults.rpc_timeout_s)):
            while objects := [wire.listed_message(each) for each in islice(listed, LISTED_AT_ONCE)]:
                yield kvstore_pb2.ListResponse(objects=objects)

    async def Verify(
        self, request: kvstore_pb2.VerifyRequest, context: Any
    ) -> AsyncIterator[kvstore_pb2.VerifyResponse]:
        """Checks copies, and says how far it is."""
        keys = wire.keys_of(request.tenant_id, request.chunk_ids) if request.chunk_ids else []
        with _ending_at(Deadline.of(context, self._defaults.rpc_timeout_s)):
            async for verified in self._housekeeping.verify(request.tenant_id, keys):
                if verified.num_checked % PROGRESS_EVERY == 0:
                    yield wire.verified_message(verified, done=False)
            yield wire.verified_message(verified, done=True)

    async def Collect(self, request: kvstore_pb2.CollectRequest, context: Any) -> kvstore_pb2.CollectResponse:
        """Throws away what is of no use."""
        check_field(request.idle_s >= 0, "idle_s", "≥ 0 seconds", request.idle_s)
        deadline = Deadline.of(context, self._defaults.rpc_timeout_s)
        work = self._housekeeping.collect(
            drop_unknown=request.drop_unknown, idle_s=request.idle_s, dry_run=request.dry_run
        )
        return wire.collected_message(await deadline.wait(work, "the collection"))

    async def _receive(
        self, requests: AsyncIterator[ReceivedFrame | kvstore_pb2.PutRequest]
    ) -> kvstore_pb2.PutResponse:
        header = _header_of(await anext(requests, None))
        record, durable = wire.record_of(header), wire.is_durable(header)
        upload = await self._store.puts.begin(record, header.claim_owner, durable=durable)
        try:
            async for request in requests:
                frame = _checked_frame(request)
                self._store.puts.append_frame(upload, frame.offset, frame.data, frame.digest)
            kept: ObjectRecord = await self._store.puts.finish(upload, durable=durable)
        finally:
            self._store.puts.abort(upload)
        current_span().event("cache.put", chunk_id=kept.key.chunk_id.hex(), num_bytes=kept.size_bytes)
        return kvstore_pb2.PutResponse(
            replica=kept.replica, tier=common_pb2.TIER_DISK if durable else common_pb2.TIER_RAM
        )


async def _responses(store: KVStore, readings: Sequence[Reading]) -> AsyncIterator[kvstore_pb2.GetResponse | bytes]:
    for index, reading in enumerate(readings):
        entry = await store.begin(reading)
        yield kvstore_pb2.GetResponse(header=kvstore_pb2.GetHeader(index=index, entry=wire.entry_message(entry)))
        if entry.record is not None:
            async for frame in reading.frames():
                yield frame_message(frame.offset, frame.pieces, frame.digest)


async def _let_sender_end(requests: AsyncIterator[ReceivedFrame | kvstore_pb2.PutRequest]) -> None:
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


def _header_of(request: ReceivedFrame | kvstore_pb2.PutRequest | None) -> kvstore_pb2.PutHeader:
    if not isinstance(request, kvstore_pb2.PutRequest) or not request.HasField("header"):
        raise InvalidRequest("the first message of Put must be the header", field="header", limit="first message")
    return request.header


def _checked_frame(request: ReceivedFrame | kvstore_pb2.PutRequest) -> ReceivedFrame:
    if not isinstance(request, ReceivedFrame):
        raise InvalidRequest("after its header, Put takes frames only", field="frame", limit="every later message")
    return request


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
