"""Chunk objects from a node's side: the stores' RPCs as calls with a deadline, and bytes checked on arrival."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from spolia.v1.common_pb2 import ObjectInfo
from spolia.v1.kvstore_pb2 import (
    DURABILITY_RAM,
    ClaimRequest,
    ClaimResult,
    DeleteRequest,
    DeleteResponse,
    Durability,
    GetRequest,
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
from spolia_core.digests import FRAME_BYTES, digest
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.frame_messages import frame_message
from spolia_node.membership import ClusterView
from spolia_node.store_address import StoreAddress, Stores, known_stores
from spolia_node.store_answers import all_of, some_of, sum_deleted
from spolia_node.store_claims import claim_at_several
from spolia_node.store_pins import pin_at_holders
from spolia_node.store_reader import StoreReader
from spolia_node.store_routes import OnLost, StoreRoutes
from spolia_node.store_stream import FetchedChunk, OnBytes
from spolia_node.tracing import trace_metadata

if TYPE_CHECKING:
    from spolia.v1.kvstore_pb2_grpc import KVStoreServiceAsyncStub as Stub  # a name for types, absent at run time

Data = bytes | bytearray | memoryview


class StoreClient:
    """Calls the stores that `stores` says there are now. Each chunk has a home among them (`store_placement`).

    What concerns a chunk goes to its home, or to the next store where that is away. Every call raises `Unavailable`
    when no store is known or none that matters can be reached, `DeadlineExceeded` when it is late, and what a store
    itself raised.
    """

    def __init__(self, channels: ChannelPool, stores: Stores, on_lost: OnLost | None = None) -> None:
        """`on_lost` is told the node id of a store that did not answer, so that `stores` closes it for a while."""
        self._routes = StoreRoutes(channels, stores, on_lost)

    @classmethod
    def of(cls, channels: ChannelPool, view: ClusterView | None, directory: str) -> StoreClient:
        """Calls the stores of `view`, which watches their role; those at `directory` while it knows none."""
        return cls(channels, known_stores(view, directory), view.mark_dead if view is not None else None)

    async def lookup(
        self,
        tenant_id: str,
        ids: Sequence[bytes],
        fingerprint: bytes,
        codecs: Sequence[str],
        deadline: Deadline,
        *,
        ignore_cost: bool = False,
    ) -> list[LookupEntry]:
        """One entry per id, in order: `info` when this reader can have it, else `miss`, and who computes it now.

        It may be in another store than the one asked: `locations` names those that have it. `ignore_cost`: also what
        was measured to come slower than it is computed.
        """

        async def ask(stub: Stub, some: Sequence[bytes]) -> Sequence[LookupEntry]:
            request = LookupRequest(
                tenant_id=tenant_id,
                chunk_ids=some,
                fingerprint=fingerprint,
                accepted_codecs=codecs,
                ignore_cost=ignore_cost,
            )
            return (await stub.Lookup(request, timeout=deadline.remaining(), metadata=trace_metadata())).entries

        return await self._routes.ask(ids, ask, deadline)

    async def get(
        self,
        tenant_id: str,
        ids: Sequence[bytes],
        fingerprint: bytes,
        codecs: Sequence[str],
        deadline: Deadline,
        *,
        ignore_cost: bool = False,
        on_bytes: OnBytes | None = None,
    ) -> AsyncGenerator[FetchedChunk, None]:
        """Yields one item per id, in order, each as soon as it is whole. Closing the iterator ends every call.

        An object that is damaged, or whose store dies, is had from another store where one has it; else bytes that do
        not match a digest, an offset or the announced length are a DIGEST miss, and the others go on. With
        `on_bytes` that takes the objects as they come, and the items have none.
        """

        def request_for(some: Sequence[bytes]) -> GetRequest:
            return GetRequest(
                tenant_id=tenant_id,
                chunk_ids=some,
                fingerprint=fingerprint,
                accepted_codecs=codecs,
                ignore_cost=ignore_cost,
            )

        reader = StoreReader(self._routes, ids, request_for, deadline, on_bytes)
        async with aclosing(reader.read()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def put(
        self,
        tenant_id: str,
        info: ObjectInfo,
        data: Data,
        deadline: Deadline,
        claim_owner: str = "",
        *,
        durability: Durability.ValueType = DURABILITY_RAM,
    ) -> PutResponse:
        """Stores an object with some durability and ends the claim on it. `data` must not change until this returns.

        Raises `AlreadyStored` when another replica was first: nothing to do; it may be an upload of this very call,
        whose answer was lost with the store before. `Busy` when there is no room.
        """
        header = PutHeader(tenant_id=tenant_id, info=info, claim_owner=claim_owner, durability=durability)

        async def ask(stub: Stub, _: Sequence[bytes]) -> list[PutResponse]:
            return [
                await stub.Put(_put_requests(header, data), timeout=deadline.remaining(), metadata=trace_metadata())
            ]

        (response,) = await self._routes.ask([info.chunk_id], ask, deadline)
        return response

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
        Of ids in several stores it returns at once when any is granted, be it again.
        """
        until = Deadline.after(wait_ms / 1000)

        async def ask(some: Sequence[bytes], wait_ms: int) -> list[ClaimResult]:
            async def at(stub: Stub, some: Sequence[bytes]) -> Sequence[ClaimResult]:
                left_ms = min(wait_ms, round(until.remaining() * 1000))  # a store may have taken some before it died
                request = ClaimRequest(tenant_id=tenant_id, chunk_ids=some, owner=owner, ttl_ms=ttl_ms, wait_ms=left_ms)
                return (await stub.Claim(request, timeout=deadline.remaining(), metadata=trace_metadata())).results

            return await self._routes.ask(some, at, deadline)

        groups: defaultdict[StoreAddress, list[bytes]] = defaultdict(list)
        distinct = list(dict.fromkeys(ids))
        for chunk_id, order in zip(distinct, self._routes.orders(distinct), strict=True):
            groups[order[0]].append(chunk_id)
        if len(groups) < 2:
            return await ask(ids, wait_ms)
        by_id = await claim_at_several(ask, list(groups.values()), wait_ms)
        return [by_id[chunk_id] for chunk_id in ids]

    async def unclaim(self, tenant_id: str, ids: Sequence[bytes], owner: str, deadline: Deadline) -> int:
        """Gives claims back without a put; how many ended."""

        async def ask(stub: Stub, some: Sequence[bytes]) -> list[int]:
            request = UnclaimRequest(tenant_id=tenant_id, chunk_ids=some, owner=owner)
            count = (await stub.Unclaim(request, timeout=deadline.remaining(), metadata=trace_metadata())).num_released
            return [count, *[0] * (len(some) - 1)]  # which of them ended, the store does not say

        return sum(await self._routes.ask(ids, ask, deadline))

    async def pin(
        self, tenant_id: str, ids: Sequence[bytes], owner: str, deadline: Deadline, *, lease_ms: int = 0
    ) -> list[bool]:
        """Keeps objects from eviction where they are; false for those that no store has. 0 `lease_ms`: the default."""

        async def ask(stub: Stub, some: Sequence[bytes]) -> Sequence[bool]:
            request = PinRequest(tenant_id=tenant_id, chunk_ids=some, owner=owner, lease_ms=lease_ms)
            return (await stub.Pin(request, timeout=deadline.remaining(), metadata=trace_metadata())).pinned

        pinned = dict(zip(ids, await self._routes.ask(ids, ask, deadline), strict=True))
        elsewhere = [chunk_id for chunk_id in pinned if not pinned[chunk_id]]
        if elsewhere and len(self._routes.everyone()) > 1:
            entries = await self.lookup(tenant_id, elsewhere, b"", (), deadline, ignore_cost=True)
            pinned |= dict.fromkeys(await pin_at_holders(self._routes, elsewhere, entries, ask, deadline), True)
        return [pinned[chunk_id] for chunk_id in ids]

    async def unpin(self, tenant_id: str, ids: Sequence[bytes], owner: str, deadline: Deadline) -> int:
        """Ends pins, on whichever store; how many ended. Those on a store that is away end with their lease."""
        request = UnpinRequest(tenant_id=tenant_id, chunk_ids=ids, owner=owner)
        answers = await self._routes.ask_every(
            lambda stub: stub.Unpin(request, timeout=deadline.remaining(), metadata=trace_metadata()), deadline
        )
        return sum(answer.num_unpinned for answer in some_of(answers))

    async def delete(self, tenant_id: str, ids: Sequence[bytes], deadline: Deadline) -> DeleteResponse:
        """Drops objects, pinned or not, every replica of them; says how many, and their bytes.

        Raises `Unavailable` naming the stores that could not be asked, after all the others were: ask again.
        """
        request = DeleteRequest(tenant_id=tenant_id, chunk_ids=ids)
        answers = await self._routes.ask_every(
            lambda stub: stub.Delete(request, timeout=deadline.remaining(), metadata=trace_metadata()), deadline
        )
        return sum_deleted(all_of(answers))

    async def stats(self, deadline: Deadline) -> list[GetStatsResponse]:
        """Counts of each store, all tenants together; stores that are away are left out, unless all are."""
        answers = await self._routes.ask_every(
            lambda stub: stub.GetStats(GetStatsRequest(), timeout=deadline.remaining(), metadata=trace_metadata()),
            deadline,
        )
        return some_of(answers)

    async def home_stats(self, chunk_id: bytes, deadline: Deadline) -> GetStatsResponse:
        """Counts of the store that a chunk would be put into now."""

        async def ask(stub: Stub, _: Sequence[bytes]) -> list[GetStatsResponse]:
            return [await stub.GetStats(GetStatsRequest(), timeout=deadline.remaining(), metadata=trace_metadata())]

        (response,) = await self._routes.ask([chunk_id], ask, deadline)
        return response


async def _put_requests(header: PutHeader, data: Data) -> AsyncIterator[Any]:
    yield PutRequest(header=header)
    view = memoryview(data).cast("B")
    for offset in range(0, len(view), FRAME_BYTES):
        piece = view[offset : offset + FRAME_BYTES]
        yield frame_message(offset, [piece], digest(piece))
