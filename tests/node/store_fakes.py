"""Scripted stores that hold chunks in a dict, any number of them, each on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from store_worlds import Chunk

from spolia.v1 import common_pb2, kvstore_pb2
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceServicer, add_KVStoreServiceServicer_to_server
from spolia_core.digests import frames
from spolia_core.errors import AlreadyStored, SpoliaError
from spolia_core.reuse import MissReason
from spolia_node.config import NodeConfig
from spolia_node.server import NodeServer
from spolia_node.store_address import StoreAddress
from spolia_node.store_placement import in_order

FRAME_BYTES = 100


class FakeStore(KVStoreServiceServicer):
    """A store among `peers`, with which it shares an index when they are given.

    `error` fails every call. `break_after` lets a Get send so many frames of its first object, then drops the
    connection; `damaged` chunks come with a digest that is not theirs; `hold` keeps a Get from sending frames until it
    is set.
    """

    def __init__(self, node_id: str, peers: list[FakeStore] | None = None) -> None:
        self.node_id = node_id
        self.peers = peers if peers is not None else [self]
        self.server = NodeServer(NodeConfig(), "kvstore")
        self.chunks: dict[bytes, Chunk] = {}
        self.claims: dict[bytes, str] = {}
        self.pins: set[bytes] = set()
        self.error: SpoliaError | None = None
        self.break_after: int | None = None
        self.damaged: set[bytes] = set()
        self.refused: dict[bytes, MissReason] = {}
        self.hold: asyncio.Event | None = None
        self.num_reading = 0
        self.asked: list[tuple[str, Any]] = []
        self.changed = asyncio.Event()

    @property
    def address(self) -> StoreAddress:
        return StoreAddress(self.node_id, self.server.address)

    def asked_for(self, name: str) -> list[list[bytes]]:
        """The ids of each call of an RPC."""
        return [list(request.chunk_ids) for kind, request in self.asked if kind == name]

    def entry(self, chunk_id: bytes) -> kvstore_pb2.LookupEntry:
        holders = [peer for peer in self.peers if chunk_id in peer.chunks]
        locations = [
            kvstore_pb2.StoreLocation(node_id=peer.node_id, address=peer.server.address, tier=common_pb2.TIER_RAM)
            for peer in holders
        ]
        if chunk_id in self.refused:
            return kvstore_pb2.LookupEntry(miss=int(self.refused[chunk_id]), locations=locations)
        if not holders:
            return kvstore_pb2.LookupEntry(miss=common_pb2.MISS_REASON_NOT_FOUND)
        info = holders[0].chunks[chunk_id].info if self not in holders else self.chunks[chunk_id].info
        return kvstore_pb2.LookupEntry(info=info, tier=common_pb2.TIER_RAM, locations=locations)

    def begin(self, name: str, request: Any) -> None:
        self.asked.append((name, request))
        if self.error is not None:
            raise self.error

    async def Lookup(self, request: Any, context: Any) -> kvstore_pb2.LookupResponse:
        self.begin("Lookup", request)
        return kvstore_pb2.LookupResponse(entries=[self.entry(chunk_id) for chunk_id in request.chunk_ids])

    async def Get(self, request: Any, context: Any) -> AsyncIterator[kvstore_pb2.GetResponse]:
        self.begin("Get", request)
        self.num_reading += 1
        try:
            for index, chunk_id in enumerate(request.chunk_ids):
                entry = self.entry(chunk_id)
                if chunk_id not in self.chunks and entry.HasField("info"):
                    entry.ClearField("info")
                    entry.miss = common_pb2.MISS_REASON_NOT_FOUND
                yield kvstore_pb2.GetResponse(header=kvstore_pb2.GetHeader(index=index, entry=entry))
                if self.hold is not None:
                    await self.hold.wait()
                if entry.HasField("info"):
                    for number, response in enumerate(self.frames_of(chunk_id)):
                        if number == self.break_after:
                            asyncio.get_running_loop().create_task(self.server.stop_at_once())
                            await asyncio.Event().wait()
                        yield response
        finally:
            self.num_reading -= 1

    def frames_of(self, chunk_id: bytes) -> Iterator[kvstore_pb2.GetResponse]:
        for offset, data, digest in frames(self.chunks[chunk_id].data, FRAME_BYTES):
            said = bytes(16) if chunk_id in self.damaged else digest
            yield kvstore_pb2.GetResponse(frame=common_pb2.Frame(offset=offset, data=data, digest=said))

    async def Put(self, request_iterator: Any, context: Any) -> kvstore_pb2.PutResponse:
        data, header = bytearray(), kvstore_pb2.PutHeader()
        async for request in request_iterator:
            if request.HasField("header"):
                header = request.header
                self.begin("Put", header)
            data += request.frame.data
        if header.info.chunk_id in self.chunks:
            raise AlreadyStored("stored before")
        self.chunks[header.info.chunk_id] = Chunk(header.info.chunk_id, bytes(data), header.info)
        return kvstore_pb2.PutResponse(replica=self.node_id)

    async def Claim(self, request: Any, context: Any) -> kvstore_pb2.ClaimResponse:
        self.begin("Claim", request)
        loop = asyncio.get_running_loop()
        until, before = loop.time() + request.wait_ms / 1000, self.states(request)
        while request.wait_ms and loop.time() < until and self.states(request) == before and "held" in before:
            try:
                async with asyncio.timeout(until - loop.time()):
                    await self.changed.wait()
            except TimeoutError:
                break
            self.changed.clear()
        results = []
        for chunk_id in request.chunk_ids:
            if chunk_id in self.chunks:
                results.append(kvstore_pb2.ClaimResult(state=kvstore_pb2.CLAIM_STATE_STORED))
                continue
            owner = self.claims.setdefault(chunk_id, request.owner)
            is_ours = owner == request.owner
            state = kvstore_pb2.CLAIM_STATE_GRANTED if is_ours else kvstore_pb2.CLAIM_STATE_HELD
            results.append(kvstore_pb2.ClaimResult(state=state, owner=owner))
        return kvstore_pb2.ClaimResponse(results=results)

    def states(self, request: Any) -> list[str]:
        def state(chunk_id: bytes) -> str:
            if chunk_id in self.chunks:
                return "stored"
            return "held" if self.claims.get(chunk_id, request.owner) != request.owner else "ours"

        return [state(chunk_id) for chunk_id in request.chunk_ids]

    async def Unclaim(self, request: Any, context: Any) -> kvstore_pb2.UnclaimResponse:
        self.begin("Unclaim", request)
        mine = [chunk_id for chunk_id in request.chunk_ids if self.claims.get(chunk_id) == request.owner]
        for chunk_id in mine:
            del self.claims[chunk_id]
        self.changed.set()
        return kvstore_pb2.UnclaimResponse(num_released=len(mine))

    async def Pin(self, request: Any, context: Any) -> kvstore_pb2.PinResponse:
        self.begin("Pin", request)
        self.pins |= set(request.chunk_ids) & set(self.chunks)
        return kvstore_pb2.PinResponse(pinned=[chunk_id in self.chunks for chunk_id in request.chunk_ids])

    async def Unpin(self, request: Any, context: Any) -> kvstore_pb2.UnpinResponse:
        self.begin("Unpin", request)
        ended = self.pins & set(request.chunk_ids)
        self.pins -= ended
        return kvstore_pb2.UnpinResponse(num_unpinned=len(ended))

    async def Delete(self, request: Any, context: Any) -> kvstore_pb2.DeleteResponse:
        self.begin("Delete", request)
        gone = [self.chunks.pop(chunk_id) for chunk_id in request.chunk_ids if chunk_id in self.chunks]
        num_bytes = sum(len(chunk.data) for chunk in gone)
        tiers = [kvstore_pb2.TierCount(tier=common_pb2.TIER_RAM, num_objects=len(gone), num_bytes=num_bytes)]
        return kvstore_pb2.DeleteResponse(num_deleted=len(gone), bytes_deleted=num_bytes, tiers=tiers)

    async def GetStats(self, request: Any, context: Any) -> kvstore_pb2.GetStatsResponse:
        self.begin("GetStats", request)
        return kvstore_pb2.GetStatsResponse(node_id=self.node_id, num_objects=len(self.chunks))


class FakeStores:
    """Several fake stores, and what a view would say of them."""

    def __init__(self, stores: Sequence[FakeStore]) -> None:
        self.stores = list(stores)
        self.lost: list[str] = []

    def __call__(self) -> list[StoreAddress]:
        return [store.address for store in self.stores]

    def by_rank(self, chunk_id: bytes) -> list[FakeStore]:
        """The stores in the order in which a chunk is looked for."""
        by_id = {store.node_id: store for store in self.stores}
        return [by_id[address.node_id] for address in in_order(chunk_id, self())]


@asynccontextmanager
async def fake_stores(count: int, *, share_index: bool = True) -> AsyncIterator[FakeStores]:
    """Stores s0, s1, …; those that are stopped by a test are left alone at the end."""
    peers: list[FakeStore] = []
    async with AsyncExitStack() as stack:
        for number in range(count):
            store = FakeStore(f"s{number}", peers if share_index else None)  # type: ignore[abstract]  # what it lacks answers UNIMPLEMENTED, and nobody here calls it
            store.server.add(
                lambda to, s=store: add_KVStoreServiceServicer_to_server(s, to), "spolia.v1.KVStoreService"
            )
            await store.server.start()
            stack.push_async_callback(store.server.stop_at_once)
            peers.append(store)
        yield FakeStores(peers)
