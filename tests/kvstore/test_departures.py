"""A node that leaves the cluster, however it ends, holds nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs
from kvstore_worlds import TENANT, Chunk, eventually, fresh_id, make_chunk, running_node

from spolia.v1.directory_pb2 import NODE_ROLE_PREFILL, NodeRecord, RegisterRequest
from spolia.v1.directory_pb2_grpc import DirectoryServiceStub
from spolia.v1.kvstore_pb2 import CLAIM_STATE_GRANTED, ClaimRequest, PinRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_kvstore.node import KVStoreNode
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.store_address import stores_at
from spolia_node.store_client import StoreClient


@pytest.fixture
async def channel(node: KVStoreNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(node.server.address) as opened:
        yield opened


@pytest.fixture
def lease_ms() -> int:
    """Longer than any test takes: nobody leaves by being slow."""
    return 60_000


@pytest.fixture
async def node(lease_ms: int) -> AsyncIterator[KVStoreNode]:
    async with running_node(node_lease_ms=lease_ms) as running:
        yield running


async def registered(channel: grpc.aio.Channel, node_id: str) -> Any:
    """A heartbeat stream whose first heartbeat was answered."""
    call = DirectoryServiceStub(channel).Register(None)
    record = NodeRecord(node_id=node_id, role=NODE_ROLE_PREFILL, address="localhost:1")
    await call.write(RegisterRequest(record=record))
    await call.read()
    return call


async def claim(channel: grpc.aio.Channel, ids: Sequence[bytes], owner: str, wait_ms: int = 0) -> list[int]:
    request = ClaimRequest(tenant_id=TENANT, chunk_ids=ids, owner=owner, ttl_ms=60_000, wait_ms=wait_ms)
    return [result.state for result in (await KVStoreServiceStub(channel).Claim(request, timeout=40)).results]


async def stored(node: KVStoreNode) -> Chunk:
    chunk, channels = make_chunk(1), ChannelPool(1 << 20)
    client = StoreClient(channels, lambda: stores_at(node.server.address))
    await client.put(TENANT, chunk.info, chunk.data, Deadline.after(10))
    await channels.close()
    return chunk


@pytest.mark.parametrize(("how", "lease_ms"), [("its stream breaks", 60_000), ("its heartbeats stop", 3000)])
async def test_what_a_dead_node_claimed_is_granted_to_who_waits(
    node: KVStoreNode, channel: grpc.aio.Channel, how: str
) -> None:
    heartbeats = await registered(channel, "prefill-a")
    wanted, chunk = fresh_id(), await stored(node)
    assert await claim(channel, [wanted], "prefill-a/request#1") == [CLAIM_STATE_GRANTED]
    pin = PinRequest(tenant_id=TENANT, chunk_ids=[chunk.chunk_id], owner="prefill-a/request#1")
    await KVStoreServiceStub(channel).Pin(pin, timeout=10)
    assert node.store.pins.num_live == 1
    waiting = asyncio.create_task(claim(channel, [wanted], "prefill-b/request#1", wait_ms=30_000))
    await eventually(lambda: node.store.claims.num_waiters == 1)
    if how == "its stream breaks":
        heartbeats.cancel()
    assert await asyncio.wait_for(waiting, 20) == [CLAIM_STATE_GRANTED], "long before the claim or the wait ends"
    assert node.store.pins.num_live == 0


async def test_a_node_that_registered_again_keeps_its_claims(node: KVStoreNode, channel: grpc.aio.Channel) -> None:
    older = await registered(channel, "prefill-a")
    newer = await registered(channel, "prefill-a")
    wanted = fresh_id()
    await claim(channel, [wanted], "prefill-a/request#1")
    left = asyncio.Event()
    leave = node.directory.leave
    node.directory.leave = lambda session: (left.set(), leave(session))[1]  # type: ignore[method-assign, func-returns-value]  # watched
    older.cancel()
    await asyncio.wait_for(left.wait(), 10)
    assert node.store.claims.num_live() == 1
    newer.cancel()
    await eventually(lambda: node.store.claims.num_live() == 0)


@pytest.mark.parametrize("lease_ms", [500])
async def test_the_log_names_whose_lease_ran_out(node: KVStoreNode) -> None:
    record = NodeRecord(node_id="prefill-a", role=NODE_ROLE_PREFILL, address="localhost:1")
    with captured_logs() as lines:
        node.directory.renew(0, record, now=0.0)  # a lease that ended long ago
        await eventually(lambda: any(line["event"] == "leases ran out" for line in lines))
    (line,) = [line for line in lines if line["event"] == "leases ran out"]
    assert line["nodes"] == ["prefill-a"]
