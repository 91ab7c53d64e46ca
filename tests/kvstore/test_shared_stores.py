"""Two stores that share a Redis: one index, one set of claims, one directory; and what they do while it is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from kvstore_worlds import FINGERPRINT, TENANT, Chunk, eventually, make_chunk, running_node
from redis_server import RedisServer

from spolia.errors import AlreadyStored, error_from_rpc
from spolia.v1 import kvstore_pb2
from spolia.v1.common_pb2 import MISS_REASON_NOT_FOUND, TIER_DISK, TIER_RAM
from spolia.v1.directory_pb2 import NODE_ROLE_DECODE, NODE_ROLE_KVSTORE, NodeRecord
from spolia.v1.kvstore_pb2 import CLAIM_STATE_GRANTED, CLAIM_STATE_HELD, CLAIM_STATE_STORED, DURABILITY_DISK
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_core.errors import SpoliaError
from spolia_kvstore import claims
from spolia_kvstore.backend import Replica
from spolia_kvstore.node import KVStoreNode
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.wire import record_of
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.membership import ClusterView, Registration
from spolia_node.store_address import StoreAddress
from spolia_node.store_client import StoreClient
from spolia_node.store_placement import in_order

CHUNK, OTHER = make_chunk(1), make_chunk(2)


class World:
    """Two stores, a client of each, and the Redis they share."""

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        self.redis = redis
        self.channels = ChannelPool(16 << 20)
        self.nodes: dict[str, KVStoreNode] = {}
        self._folder = folder
        self._stacks: dict[str, AsyncExitStack] = {}

    async def start(self, name: str) -> KVStoreNode:
        stack = self._stacks[name] = AsyncExitStack()
        settings = {"redis_url": self.redis.url, "data_dir": self._folder / name, "node_lease_ms": 3000}
        node = await stack.enter_async_context(running_node(node_id=name, budget_bytes=32 << 20, **settings))
        self.nodes[name] = node
        return node

    async def stop(self, name: str) -> None:
        await self._stacks.pop(name).aclose()
        del self.nodes[name]

    async def close(self) -> None:
        await self.channels.close()
        for name in list(self._stacks):
            await self.stop(name)

    def stub(self, name: str) -> KVStoreServiceStub:
        return KVStoreServiceStub(self.channels.get(self.nodes[name].server.address, "kvstore"))

    def client(self, *names: str) -> StoreClient:
        stores = [StoreAddress(name, self.nodes[name].server.address) for name in names]
        return StoreClient(self.channels, lambda: stores)

    async def know_each_other(self) -> None:
        await eventually(
            lambda: all(
                {record.node_id for record in node.directory.nodes({NODE_ROLE_KVSTORE})} == set(self.nodes)
                for node in self.nodes.values()
            )
        )

    async def lookup(self, name: str, chunk: Chunk) -> kvstore_pb2.LookupEntry:
        request = kvstore_pb2.LookupRequest(tenant_id=TENANT, chunk_ids=[chunk.chunk_id])
        return (await self.stub(name).Lookup(request, timeout=10)).entries[0]

    async def until_located(self, name: str, chunk: Chunk) -> None:
        async with asyncio.timeout(20):
            while not (await self.lookup(name, chunk)).locations:  # noqa: ASYNC110 - an index has no event for it
                await asyncio.sleep(0.02)

    async def claim(self, name: str, chunk: Chunk, owner: str, wait_ms: int = 0) -> int:
        request = kvstore_pb2.ClaimRequest(
            tenant_id=TENANT, chunk_ids=[chunk.chunk_id], owner=owner, ttl_ms=60_000, wait_ms=wait_ms
        )
        return (await self.stub(name).Claim(request, timeout=20)).results[0].state


@pytest.fixture
async def world(tmp_path: Path, patient: None) -> AsyncIterator[World]:
    with RedisServer(tmp_path / "redis") as redis:
        world = World(redis, tmp_path)
        try:
            for name in ("a", "b"):
                await world.start(name)
            await world.know_each_other()
            yield world
        finally:
            await world.close()


def soon() -> Deadline:
    return Deadline.after(20.0)


async def put(world: World, name: str, chunk: Chunk = CHUNK) -> None:
    await world.client(name).put(TENANT, chunk.info, chunk.data, soon(), durability=DURABILITY_DISK)


async def refused(world: World, name: str, chunk: Chunk) -> SpoliaError:
    with pytest.raises(SpoliaError) as caught:
        await put(world, name, chunk)
    return caught.value


async def test_each_store_says_where_an_object_of_the_other_is(world: World) -> None:
    await put(world, "a")
    entry = await world.lookup("b", CHUNK)
    assert [(place.node_id, place.address, place.tier) for place in entry.locations] == [
        ("a", world.nodes["a"].server.address, TIER_RAM)
    ]
    assert entry.info.digest == CHUNK.info.digest
    assert [place.node_id for place in (await world.lookup("a", CHUNK)).locations] == ["a"]


async def test_a_get_at_the_wrong_store_is_a_miss_that_names_the_right_one(world: World) -> None:
    await put(world, "a")
    request = kvstore_pb2.GetRequest(tenant_id=TENANT, chunk_ids=[CHUNK.chunk_id])
    (response,) = [each async for each in world.stub("b").Get(request, timeout=10)]
    entry = response.header.entry
    assert (entry.miss, [place.node_id for place in entry.locations]) == (MISS_REASON_NOT_FOUND, ["a"])


async def test_a_client_gets_an_object_from_wherever_it_is(world: World) -> None:
    for number in range(6):
        await put(world, "ab"[number % 2], make_chunk(number))
    ids = [make_chunk(number).chunk_id for number in range(6)]
    chunks = [chunk async for chunk in world.client("a", "b").get(TENANT, ids, FINGERPRINT, ["raw"], soon())]
    assert [chunk.data for chunk in chunks] == [make_chunk(number).data for number in range(6)]


async def test_the_first_put_wins_across_stores(world: World) -> None:
    await put(world, "a")
    error = await refused(world, "b", CHUNK)
    assert isinstance(error, AlreadyStored)
    assert "at a" in error.message
    assert not world.nodes["b"].store.num_objects


async def test_a_claim_at_one_store_holds_at_the_other_and_a_put_wakes_who_waits_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LOOK_AGAIN_S", 60.0)
    assert await world.claim("a", CHUNK, "node-1") == CLAIM_STATE_GRANTED
    assert await world.claim("b", CHUNK, "node-2") == CLAIM_STATE_HELD
    waiting = asyncio.create_task(world.claim("b", CHUNK, "node-2", wait_ms=15_000))
    await eventually(lambda: world.nodes["b"].store.claims.num_waiters == 1)
    started = asyncio.get_running_loop().time()
    await put(world, "a")
    assert await waiting == CLAIM_STATE_STORED
    assert asyncio.get_running_loop().time() - started < 10.0, "it was told, and did not find out by looking again"


async def test_a_node_registered_at_one_store_is_seen_at_the_other_and_its_claims_end_when_it_leaves(
    world: World,
) -> None:
    def record() -> NodeRecord:
        return NodeRecord(node_id="decode-1", role=NODE_ROLE_DECODE, address="127.0.0.1:1")

    registration = Registration(world.channels, world.nodes["a"].server.address, record)
    registration.start()
    view = ClusterView(world.channels, world.nodes["b"].server.address, [NODE_ROLE_DECODE])
    view.start()
    await view.wait_for(lambda view: bool(view.nodes(NODE_ROLE_DECODE)), soon())
    assert await world.claim("b", CHUNK, "decode-1/request") == CLAIM_STATE_GRANTED
    await registration.stop()
    await view.wait_for(lambda view: not view.nodes(NODE_ROLE_DECODE), soon())
    assert await world.claim("a", CHUNK, "node-2", wait_ms=10_000) == CLAIM_STATE_GRANTED
    await view.stop()


async def test_a_store_that_died_does_not_count_as_holding_anything(world: World) -> None:
    await put(world, "a")
    await world.stop("a")
    await world.know_each_other()
    assert (await world.lookup("b", CHUNK)).miss == MISS_REASON_NOT_FOUND
    assert await world.claim("b", CHUNK, "node-2") == CLAIM_STATE_GRANTED
    await put(world, "b")


async def test_without_redis_both_go_on_with_what_they_hold_and_say_it_again_to_an_empty_one(world: World) -> None:
    await put(world, "a")
    await asyncio.to_thread(world.redis.kill)
    assert (await world.lookup("a", CHUNK)).info.digest == CHUNK.info.digest
    await put(world, "a", OTHER)
    await world.nodes["a"].store.delete([ObjectKey(TENANT, CHUNK.chunk_id)])
    assert await world.claim("a", make_chunk(3), "node-1") == CLAIM_STATE_GRANTED
    assert await world.claim("a", make_chunk(3), "node-2") == CLAIM_STATE_HELD
    assert {record.node_id for record in world.nodes["b"].directory.nodes()} == {"a", "b"}
    stats = await world.stub("a").GetStats(kvstore_pb2.GetStatsRequest(), timeout=10)
    assert (stats.backend, stats.backend_reachable) == ("redis", False)

    await asyncio.to_thread(world.redis.start)
    await world.until_located("b", OTHER)
    assert (await world.lookup("b", CHUNK)).miss == MISS_REASON_NOT_FOUND
    await world.know_each_other()
    assert await world.claim("b", make_chunk(3), "node-2") == CLAIM_STATE_HELD, "the claim was said again too"


async def test_what_is_forgotten_while_a_store_is_away_does_not_come_back_with_it(world: World) -> None:
    await put(world, "a")
    await put(world, "a", OTHER)
    await world.stop("a")
    await world.know_each_other()
    await world.client("b").delete(TENANT, [CHUNK.chunk_id], soon())
    node = await world.start("a")
    await eventually(lambda: node.store.num_objects == 1)
    await world.know_each_other()
    assert (await world.lookup("b", OTHER)).locations[0].tier == TIER_DISK
    assert (await world.lookup("a", CHUNK)).miss == MISS_REASON_NOT_FOUND
    assert (await world.lookup("b", CHUNK)).miss == MISS_REASON_NOT_FOUND


async def test_a_reader_whose_objects_home_is_away_gets_it_from_another_store_that_has_it(world: World) -> None:
    """Two replicas, stored while neither store could tell the other. Tests of the reader itself cut it off midway."""
    await asyncio.to_thread(world.redis.kill)
    for name in ("a", "b"):
        await put(world, name)
    await asyncio.to_thread(world.redis.start)
    client = world.client("a", "b")
    home = in_order(CHUNK.chunk_id, [StoreAddress(name, "") for name in ("a", "b")])[0]
    await world.stop(home.name)
    chunks = [chunk async for chunk in client.get(TENANT, [CHUNK.chunk_id], FINGERPRINT, ["raw"], soon())]
    assert [chunk.data for chunk in chunks] == [CHUNK.data]


async def test_an_index_entry_without_an_object_is_withdrawn_when_somebody_asks(world: World) -> None:
    await put(world, "a")
    store = world.nodes["a"].store
    await store.tiers.delete([ObjectKey(TENANT, CHUNK.chunk_id)])
    await eventually(lambda: store.index.is_idle)
    stale = record_of(kvstore_pb2.PutHeader(tenant_id=TENANT, info=CHUNK.info))
    await store.backend.publish([Replica(stale, Tier.DISK, "a")])
    assert (await world.lookup("b", CHUNK)).locations
    assert (await world.lookup("a", CHUNK)).miss == MISS_REASON_NOT_FOUND
    await eventually(lambda: store.index.is_idle)
    assert not (await world.lookup("b", CHUNK)).locations


async def test_a_put_that_must_be_on_disk_is_not_refused_for_a_copy_in_memory_elsewhere(world: World) -> None:
    await world.client("a").put(TENANT, CHUNK.info, CHUNK.data, soon())
    await put(world, "b")
    header = kvstore_pb2.PutRequest(header=kvstore_pb2.PutHeader(tenant_id=TENANT, info=CHUNK.info))
    with pytest.raises(grpc.RpcError) as caught:
        await world.stub("a").Put(iter([header]), timeout=10)
    assert isinstance(error_from_rpc(caught.value), AlreadyStored)
