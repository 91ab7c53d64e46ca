"""A gateway with several stores: documents are found in any, and forgotten in all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import WAIT_S, FakeDecode, FakeStore, record
from gateway_worlds import World, serve, world

from spolia.errors import error_from_rpc
from spolia.v1 import common_pb2, directory_pb2, gateway_pb2, kvstore_pb2, kvstore_pb2_grpc
from spolia_core.errors import Unavailable

DOCUMENTS = [gateway_pb2.Document(text=f"stone {number}") for number in range(6)]


class TieredStore(FakeStore):
    """Says on which tier it had what it drops: in memory, and the longer half on disk too."""

    async def Delete(self, request: kvstore_pb2.DeleteRequest, context: Any) -> kvstore_pb2.DeleteResponse:
        response = await super().Delete(request, context)
        counts = [(common_pb2.TIER_RAM, response.num_deleted), (common_pb2.TIER_DISK, response.num_deleted // 2)]
        response.tiers.extend(
            kvstore_pb2.TierCount(tier=tier, num_objects=count, num_bytes=10 * count) for tier, count in counts
        )
        return response


@asynccontextmanager
async def world_of_stores(model: Path, count: int) -> AsyncIterator[tuple[World, dict[str, FakeStore]]]:
    """A world whose directory lists `count` stores; that of the world itself is not among them."""
    async with AsyncExitStack() as stack:
        w = await stack.enter_async_context(world(model, decodes=[FakeDecode("a")], num_prefills=1))
        stores: dict[str, FakeStore] = {}
        for number in range(count):
            node_id = f"kvstore-{number}"
            stores[node_id] = TieredStore()  # type: ignore[abstract]  # what it lacks answers UNIMPLEMENTED, and nobody here calls it
            add = partial(kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server, stores[node_id])
            _, address = await serve(stack, add)
            w.directory.put(record(node_id, directory_pb2.NODE_ROLE_KVSTORE, address))
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_KVSTORE)) == count)
        yield w, stores


async def warm(w: World) -> list[gateway_pb2.WarmResponse]:
    request = gateway_pb2.WarmRequest(documents=DOCUMENTS)
    return [response async for response in w.stub.Warm(request, timeout=WAIT_S)]


async def forget(w: World) -> gateway_pb2.ForgetResponse:
    return await w.stub.Forget(gateway_pb2.ForgetRequest(documents=DOCUMENTS), timeout=WAIT_S)


async def test_forgetting_reaches_every_replica_and_sums_tiers(model: Path) -> None:
    async with world_of_stores(model, 3) as (w, stores):
        await warm(w)
        for node_id in ("kvstore-0", "kvstore-1"):
            stores[node_id].objects = dict(w.store.objects)  # the fake prefill node stored them elsewhere
        response = await forget(w)
        assert response.num_stored_dropped == 12
        assert response.stored_bytes_dropped == 2 * sum(w.store.objects.values())
        assert [(t.tier, t.num_objects, t.num_bytes) for t in response.stored_tiers] == [
            (common_pb2.TIER_RAM, 12, 120),
            (common_pb2.TIER_DISK, 6, 60),
        ]
        assert not any(store.objects for store in stores.values())


async def test_a_store_that_fails_is_named_and_the_others_forget(model: Path) -> None:
    async with world_of_stores(model, 2) as (w, stores):
        await warm(w)
        for store in stores.values():
            store.objects = dict(w.store.objects)
        stores["kvstore-0"].delete_error = Unavailable("draining")
        for _ in range(2):  # the second time it is hidden, and must be asked all the same
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await forget(w)
            error = error_from_rpc(caught.value)
            assert isinstance(error, Unavailable)
            assert "stores kvstore-0 cannot be reached now" in error.message
        assert not stores["kvstore-1"].objects
        stores["kvstore-0"].delete_error = None
        assert (await forget(w)).num_stored_dropped == 6
