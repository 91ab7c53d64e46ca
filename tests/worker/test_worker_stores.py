"""Nodes with an engine and two stores: chunks lie in both, and one that dies costs what it held, no more."""

from __future__ import annotations

import asyncio

from tiny_answers import ask, assert_same
from tiny_cluster import TENANT, WAIT_S, World, doc, eventually, ids_of, tokens

from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_kvstore.node import KVStoreNode
from spolia_node.deadline import Deadline
from spolia_node.store_client import StoreClient
from spolia_prefill.node import PrefillNode

PARAMS = SamplingParams(max_tokens=6)
DOCUMENTS = [doc(40 + seed, seed) for seed in range(12)]


async def two_stores(world: World) -> tuple[KVStoreNode, KVStoreNode]:
    """The one that keeps the directory, and another."""
    first = await world.store(node_id="kvstore-a")
    directory = world.directory
    second = await world.store(node_id="kvstore-b", directory=directory)
    world.directory = directory
    return first, second


async def sees_both(node: DecodeNode | PrefillNode) -> None:
    assert node.view is not None
    await node.view.wait_for(lambda view: len(view.nodes(NODE_ROLE_KVSTORE)) == 2, Deadline.after(WAIT_S))


async def stored_at(node: DecodeNode, store: KVStoreNode) -> int:
    """How many of the documents a store holds."""
    ids = [ids_of(node.engine).local(document.token_ids) for document in DOCUMENTS]
    client = StoreClient.of(node.channels, None, store.server.address)
    entries = await client.lookup(TENANT, ids, b"", (), Deadline.after(WAIT_S))
    return sum(entry.HasField("info") for entry in entries)


async def test_compiled_chunks_spread_over_the_stores_and_are_found_in_both(world: World) -> None:
    stores = await two_stores(world)
    prefill = await world.prefill()
    decode, reader = await world.decode(), await world.decode()
    await asyncio.gather(*(sees_both(node) for node in (prefill, decode, reader)))
    parts = [*DOCUMENTS, tokens(9)]
    expected = world.expect(parts, PARAMS, ReuseMode.LINKED)
    assert_same(await ask(decode, parts, PARAMS, ReuseMode.LINKED), expected)
    counts = [await stored_at(decode, store) for store in stores]
    assert sum(counts) == len(DOCUMENTS)
    assert min(counts) > 0
    answer = await ask(reader, parts, PARAMS, ReuseMode.LINKED)
    assert_same(answer, expected)
    assert not answer.report.misses


async def test_when_a_store_dies_what_it_held_is_computed_again_and_kept_by_the_other(world: World) -> None:
    first, second = await two_stores(world)
    prefill = await world.prefill()
    decode, reader = await world.decode(), await world.decode()
    await asyncio.gather(*(sees_both(node) for node in (prefill, decode, reader)))
    parts = [*DOCUMENTS, tokens(9)]
    expected = world.expect(parts, PARAMS, ReuseMode.LINKED)
    await ask(decode, parts, PARAMS, ReuseMode.LINKED)
    num_lost = await stored_at(decode, second)
    await world.kill_store(second)
    answer = await ask(reader, parts, PARAMS, ReuseMode.LINKED)
    assert_same(answer, expected)
    assert len(answer.report.misses) == num_lost
    assert answer.report.inline_bytes == 0, "the store that is left takes them"
    await eventually(lambda: not prefill.claims._giving_back)
    assert await stored_at(decode, first) <= len(DOCUMENTS)
