"""A chunk on its way: from one replica, or from the next as long as nothing of the first was read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from tiny_cluster import TENANT, World, ids_of, is_idle, tokens

from spolia.v1.common_pb2 import ObjectInfo, Tier
from spolia.v1.kvstore_pb2 import LookupEntry
from spolia_core.errors import DataCorrupt, DeadlineExceeded
from spolia_core.reuse import ChunkKind, MissReason
from spolia_decode.node import DecodeNode
from spolia_engine.kv_bytes import layer_of_run, run_to_object
from spolia_engine.linked_blocks import LinkedBlock
from spolia_node.deadline import Deadline
from spolia_node.store_stream import FetchedChunk
from spolia_worker.arriving import ArrivingChunk, ChunkLost
from spolia_worker.chunk_fetch import ChunkFetcher


def an_object(node: DecodeNode, count: int = 40) -> tuple[bytes, bytearray, list[tuple[bytes, bytes]]]:
    """A chunk id, its object, and its layers; nothing of it stays in memory."""
    core, token_ids = node.engine, tokens(count, 3)
    chunk_id = ids_of(core).local(token_ids)
    run = core.compile(chunk_id, token_ids)
    layers = [layer_of_run(run, layer) for layer in range(core.adapter.num_layers)]
    data = bytearray(run_to_object(run, core.meta(chunk_id, ChunkKind.LOCAL, run)))
    core.resident.drop(chunk_id)
    core.pool.release(run.extent)
    return chunk_id, data, layers


class TwoReplicas:
    """A Get that breaks off after `first` bytes of a replica and starts anew at another; then ends as `end` says."""

    def __init__(self, data: bytearray, first: int, end: Exception | None = None) -> None:
        self._data = data
        self._first = first
        self._end = end

    async def get(self, _tenant: str, ids: list[bytes], *_: Any, on_bytes: Any) -> AsyncIterator[FetchedChunk]:
        entry = LookupEntry(info=ObjectInfo(size_bytes=len(self._data)), tier=Tier.TIER_RAM)
        for num_bytes in (0, self._first, 0, len(self._data)):
            on_bytes(0, entry.info, 0, memoryview(self._data)[:num_bytes])
        yield FetchedChunk(0, ids[0], entry, None, None)
        if self._end is not None:
            raise self._end


async def receive(node: DecodeNode, store: TwoReplicas, chunk: ArrivingChunk, on_layer: Any = lambda: None) -> Any:
    fetcher = ChunkFetcher(node.engine, store)  # type: ignore[arg-type]  # has the method that is called
    return await fetcher.fetch_arriving(TENANT, chunk, Deadline.after(10), on_layer)


async def test_another_replica_starts_a_chunk_anew_while_nothing_was_read(world: World) -> None:
    node = await world.decode()
    chunk_id, data, layers = an_object(node)
    chunk = ArrivingChunk(node.engine, chunk_id, 40)
    received = await receive(node, TwoReplicas(data, len(data) - 1), chunk)
    assert received.miss is None
    assert [layer_of_run(chunk.run, layer) for layer in range(len(layers))] == layers
    chunk.release()
    assert is_idle(node.engine.pool)


async def test_bytes_of_two_replicas_are_never_read_together(world: World) -> None:
    node = await world.decode()
    chunk_id, data, _ = an_object(node)
    chunk = ArrivingChunk(node.engine, chunk_id, 40)
    received = await receive(node, TwoReplicas(data, len(data) - 1), chunk, on_layer=lambda: chunk.has(0))
    assert received.miss is MissReason.STORE_UNREACHABLE, "nothing was damaged"
    assert received.num_bytes == len(data) - 1, "what moved counts; the second replica is not had in vain"
    with pytest.raises(ChunkLost):
        chunk.has(0)
    chunk.release()
    assert is_idle(node.engine.pool)


@pytest.mark.parametrize("damaged_layer", [0, 1, 2])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
async def test_a_damaged_layer_is_never_to_be_read_and_those_before_it_were(
    world: World, damaged_layer: int, at_once: int
) -> None:
    """Frames may be right where the object was wrong before it was cut into them."""
    node = await world.decode()
    chunk_id, data, layers = an_object(node)
    num_bytes = [len(key) + len(value) for key, value in layers]
    data[-sum(num_bytes[damaged_layer:]) + 5] ^= 1
    chunk, info, read = ArrivingChunk(node.engine, chunk_id, 40), ObjectInfo(size_bytes=len(data)), 0
    chunk.take(info, 0, memoryview(b""))
    for start in range(0, len(data), at_once):
        if chunk.take(info, start, memoryview(data)[start : start + at_once]):
            assert chunk.has(read)
            read += 1
    assert read == (damaged_layer if at_once < min(num_bytes) else 0), "what came in one piece with the damage is lost"
    assert isinstance(chunk.failure, DataCorrupt)
    assert f"layer {damaged_layer}" in chunk.failure.message
    with pytest.raises(ChunkLost):
        chunk.has(0)
    chunk.release()
    assert is_idle(node.engine.pool)


@pytest.mark.parametrize("at_once", [1, 7, 999, 4096])
async def test_a_chunk_is_the_same_in_whatever_pieces_it_came(world: World, at_once: int) -> None:
    node = await world.decode()
    chunk_id, data, layers = an_object(node)
    chunk, info, num_whole = ArrivingChunk(node.engine, chunk_id, 40), ObjectInfo(size_bytes=len(data)), 0
    chunk.take(info, 0, memoryview(b""))
    for start in range(0, len(data), at_once):
        num_whole += chunk.take(info, start, memoryview(data)[start : start + at_once])
    assert num_whole == len(layers)
    assert [layer_of_run(chunk.run, layer) for layer in range(len(layers))] == layers
    chunk.arrive()
    chunk.release()
    assert chunk_id in node.engine.resident


async def test_a_chunk_that_is_whole_stays_however_its_stream_ends(world: World) -> None:
    node = await world.decode()
    chunk_id, data, _ = an_object(node)
    chunk = ArrivingChunk(node.engine, chunk_id, 40)
    received = await receive(node, TwoReplicas(data, 0, DeadlineExceeded("the end was late")), chunk)
    assert received.miss is None
    assert chunk_id in node.engine.resident
    chunk.release()


async def test_fetched_linked_chunks_take_no_memory_for_what_lies_between_them(world: World) -> None:
    store = await world.store()
    giver, taker = await world.decode(), await world.decode()
    blocks, runs = [], []
    for number, position in enumerate((0, 500, 1000)):
        chunk_id = bytes([number]) * 32
        extent = giver.engine.pool.allocate(20)
        extent.key.fill_(number)
        extent.value.fill_(-number)
        runs.append(
            (chunk_id, giver.engine.adopt(extent, 0, 20, rope_base=position, chunk_id=chunk_id, kind=ChunkKind.LINKED))
        )
        blocks.append(LinkedBlock(chunk_id, position, 20, ChunkKind.LINKED, number * 20))
    giver.parts.publisher.publish(TENANT, ChunkKind.LINKED, runs)
    await giver.parts.publisher.drain()
    assert len(store.store.tiers.ram) == 3
    fetched = await taker.parts.fetcher.fetch_prefix(TENANT, blocks, Deadline.after(10))
    found = list(fetched.runs.values())
    assert {run.extent.num_blocks for run in found} == {taker.engine.pool.blocks_for(60)}
    for (_, sent), came in zip(runs, found, strict=True):
        assert came.rope_base == sent.rope_base
        assert layer_of_run(came, 1) == layer_of_run(sent, 1)
    taker.parts.fetcher.release(fetched)
    for _, run in runs:
        giver.engine.pool.release(run.extent)
