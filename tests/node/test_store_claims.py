"""Of all who want a chunk that nobody has, one computes it: claims, through the store's client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from store_worlds import (
    TENANT,
    eventually,
    fetch,
    make_chunk,
    running_store,
    soon,
)

from spolia.v1 import kvstore_pb2
from spolia_kvstore.node import KVStoreNode
from spolia_node.channels import ChannelPool
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


async def compute_once(client: StoreClient, owner: str, compute: Callable[[], None], ttl_ms: int = 0) -> bytes:
    """What a node does with a chunk it lacks."""
    while True:
        (result,) = await client.claim(TENANT, [CHUNK.chunk_id], owner, soon(), ttl_ms=ttl_ms, wait_ms=10_000)
        if result.state == STORED:
            (chunk,) = await fetch(client, CHUNK.chunk_id)
            assert chunk.data is not None
            return bytes(chunk.data)
        if result.state == GRANTED:
            compute()
            await client.put(TENANT, CHUNK.info, CHUNK.data, soon(), claim_owner=owner)


async def test_two_nodes_compute_a_chunk_once(node: KVStoreNode, client: StoreClient) -> None:
    (mine,) = await client.claim(TENANT, [CHUNK.chunk_id], "first", soon())
    assert mine.state == GRANTED
    computed: list[str] = []
    second = asyncio.create_task(compute_once(client, "second", lambda: computed.append("second")))
    await eventually(lambda: node.store.claims.num_waiters == 1)
    await client.put(TENANT, CHUNK.info, CHUNK.data, soon(), claim_owner="first")
    assert await second == CHUNK.data
    assert computed == []


async def test_a_node_that_died_with_the_claim_is_replaced_by_the_one_that_waits(client: StoreClient) -> None:
    await client.claim(TENANT, [CHUNK.chunk_id], "dead", soon(), ttl_ms=50)
    computed: list[str] = []
    assert await compute_once(client, "waiter", lambda: computed.append("waiter")) == CHUNK.data
    assert computed == ["waiter"]


async def test_of_ten_nodes_at_once_one_computes_and_all_get_it(node: KVStoreNode, client: StoreClient) -> None:
    computed: list[int] = []

    def computing(number: int) -> Callable[[], None]:
        return lambda: computed.append(number)

    work = [compute_once(client, f"node-{number}", computing(number)) for number in range(10)]
    assert await asyncio.gather(*work) == [CHUNK.data] * 10
    assert len(computed) == 1
    assert (await client.stats(soon()))[0].puts == 1
    assert node.store.claims.num_live() == node.store.claims.num_waiters == 0


async def test_only_one_of_ten_claims_is_granted_and_unclaim_passes_it_on(client: StoreClient) -> None:
    ids = [CHUNK.chunk_id]
    results = await asyncio.gather(*(client.claim(TENANT, ids, f"n{i}", soon()) for i in range(10)))
    owners = {result.owner for (result,) in results}
    assert sorted(result.state == GRANTED for (result,) in results) == [False] * 9 + [True]
    assert len(owners) == 1
    assert await client.unclaim(TENANT, ids, owners.pop(), soon()) == 1
    (next_one,) = await client.claim(TENANT, ids, "next", soon())
    assert next_one.state == GRANTED
