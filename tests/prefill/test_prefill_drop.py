"""Chunks a prefill node was told to forget are computed anew; others stay."""

from __future__ import annotations

import grpc
from prefill_streams import compile_work, start_of, whole
from tiny_cluster import TENANT, World, doc, ids_of

from spolia.v1.prefill_pb2 import PrefillServiceDropRequest
from spolia.v1.prefill_pb2_grpc import PrefillServiceStub
from spolia_node.calls import call_errors

FORGOTTEN, KEPT = doc(40, 1), doc(64, 2)


async def test_drop_forgets_what_it_names_and_may_be_repeated(world: World) -> None:
    node = await world.prefill()
    await whole(node, start_of(node, compile=compile_work(node, [FORGOTTEN, KEPT], [FORGOTTEN, KEPT])))
    ids = ids_of(node.engine)
    forgotten, kept = (ids.local(document.token_ids) for document in (FORGOTTEN, KEPT))
    resident = node.engine.resident
    assert forgotten in resident
    request = PrefillServiceDropRequest(tenant_id=TENANT, chunk_ids=[forgotten, bytes(32)])
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        with call_errors("prefill"):
            counts = [(await PrefillServiceStub(channel).Drop(request, timeout=10)).num_dropped for _ in range(2)]
    assert counts == [1, 0]
    assert (forgotten in resident, kept in resident) == (False, True)
    again = await whole(node, start_of(node, compile=compile_work(node, [FORGOTTEN], [FORGOTTEN])))
    assert again[-1].done.num_computed_tokens == len(FORGOTTEN.token_ids)
