"""Claims over gRPC, in raw messages: who is granted, who waits, and what a drain does to both."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from kvstore_calls import (
    BODY,
    CHUNK,
    GRANTED,
    HELD,
    STORED,
    claim,
    frames_of,
    get,
    header_of,
    node,
    refusal,
    stub,
    upload_of,
)
from kvstore_worlds import (
    TENANT,
    eventually,
    fresh_id,
    make_big_chunk,
)

from spolia.errors import (
    InvalidRequest,
    Unavailable,
    error_from_rpc,
)
from spolia.v1 import kvstore_pb2
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceStub
from spolia_kvstore.node import KVStoreNode

__all__ = ["node", "stub"]  # fixtures


async def test_a_put_ends_the_claim_and_wakes_who_waits(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    assert await claim(stub, [CHUNK.chunk_id], "a") == [GRANTED]
    waiting = asyncio.create_task(claim(stub, [CHUNK.chunk_id], "b", wait_ms=15_000))
    await eventually(lambda: node.store.claims.num_waiters == 1)
    requests = [header_of(CHUNK.info, claim_owner="a"), *frames_of(CHUNK.data)]
    await stub.Put(iter(requests), timeout=10)
    assert await waiting == [STORED]
    assert node.store.claims.num_live() == 0


async def test_a_failed_put_keeps_the_claim(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    await claim(stub, [CHUNK.chunk_id], "a")
    await refusal(stub, [header_of(CHUNK.info, claim_owner="a"), *BODY[1:]])
    assert await claim(stub, [CHUNK.chunk_id], "b") == [HELD]


async def test_a_waiter_takes_over_what_is_given_back_or_lapses(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    returned, lapsing = fresh_id(), fresh_id()
    await claim(stub, [returned], "a")
    waiting = asyncio.create_task(claim(stub, [returned], "b", wait_ms=15_000))
    await eventually(lambda: node.store.claims.num_waiters == 1)
    request = kvstore_pb2.UnclaimRequest(tenant_id=TENANT, chunk_ids=[returned], owner="a")
    assert (await stub.Unclaim(request, timeout=10)).num_released == 1
    assert await waiting == [GRANTED]
    await claim(stub, [lapsing], "a", ttl_ms=50)
    assert await claim(stub, [lapsing], "b", wait_ms=15_000) == [GRANTED]


async def test_a_waiting_claim_returns_held_when_its_wait_or_its_deadline_is_nearly_over(
    stub: KVStoreServiceStub,
) -> None:
    held = fresh_id()
    await claim(stub, [held], "a")
    assert await claim(stub, [held], "b", wait_ms=20) == [HELD]
    request = kvstore_pb2.ClaimRequest(tenant_id=TENANT, chunk_ids=[held], owner="b", wait_ms=60_000)
    (result,) = (await stub.Claim(request, timeout=6.0)).results
    assert (result.state, result.owner) == (HELD, "a")
    assert 0 < result.ttl_ms <= 30_000


async def test_something_newly_granted_is_not_held_up_by_what_another_holds(stub: KVStoreServiceStub) -> None:
    held, free = fresh_id(), fresh_id()
    await claim(stub, [held], "a")
    assert await asyncio.wait_for(claim(stub, [held, free], "b", wait_ms=15_000), 10) == [HELD, GRANTED]


async def test_a_waiter_that_vanishes_is_granted_nothing(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    held = fresh_id()
    await claim(stub, [held], "a")
    request = kvstore_pb2.ClaimRequest(tenant_id=TENANT, chunk_ids=[held], owner="b", wait_ms=15_000)
    call = stub.Claim(request, timeout=20)
    await eventually(lambda: node.store.claims.num_waiters == 1)
    call.cancel()
    await eventually(lambda: node.store.claims.num_waiters == 0)
    unclaim = kvstore_pb2.UnclaimRequest(tenant_id=TENANT, chunk_ids=[held], owner="a")
    await stub.Unclaim(unclaim, timeout=10)
    assert await claim(stub, [held], "c") == [GRANTED]


@pytest.mark.parametrize(
    ("field", "changes"), [("owner", {"owner": ""}), ("ttl_ms", {"ttl_ms": 600_001}), ("tenant_id", {"tenant_id": ""})]
)
async def test_a_bad_claim_is_refused_by_field(
    stub: KVStoreServiceStub, field: str, changes: dict[str, object]
) -> None:
    fields = {"tenant_id": TENANT, "chunk_ids": [fresh_id()], "owner": "a", **changes}
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Claim(kvstore_pb2.ClaimRequest(**fields), timeout=10)  # type: ignore[arg-type]  # fields differ in type
    error = error_from_rpc(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == field


async def test_draining_ends_waiting_claims_at_once(node: KVStoreNode, stub: KVStoreServiceStub) -> None:
    held = fresh_id()
    await claim(stub, [held], "a")
    waiting = asyncio.create_task(claim(stub, [held], "b", wait_ms=15_000))
    await eventually(lambda: node.store.claims.num_waiters == 1)
    assert await node.server.drain()
    with pytest.raises(grpc.RpcError) as caught:
        await waiting
    assert isinstance(error_from_rpc(caught.value), Unavailable)


async def test_a_draining_store_refuses_puts_and_claims_and_serves_what_it_has(
    node: KVStoreNode, stub: KVStoreServiceStub
) -> None:
    await stub.Put(iter(upload_of(CHUNK)), timeout=10)
    may_end = asyncio.Event()

    async def hook() -> None:
        await may_end.wait()

    node.server.on_drain.append(hook)
    drain = asyncio.create_task(node.server.drain())
    await eventually(lambda: not node.server.accepting)
    assert isinstance(await refusal(stub, upload_of(make_big_chunk(2))), Unavailable)
    with pytest.raises(grpc.RpcError) as caught:
        await claim(stub, [fresh_id()], "me")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(await get(stub, [CHUNK.chunk_id])) == 2
    assert (node.store.num_objects, node.store.claims.num_live()) == (1, 0)
    may_end.set()
    assert await drain
