"""A real kvstore node on a free port, chunk objects for it, and a store that lies, for tests of the client side."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from spolia.v1.common_pb2 import ObjectInfo
from spolia.v1.kvstore_pb2 import GetResponse
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceServicer, add_KVStoreServiceServicer_to_server
from spolia_core.chunk_object import ChunkMeta, KvShape, build_chunk_object
from spolia_core.reuse import ChunkKind
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.node import KVStoreNode
from spolia_node.config import NodeConfig
from spolia_node.deadline import Deadline
from spolia_node.rpc_messages import object_info
from spolia_node.server import NodeServer
from spolia_node.store_client import StoreClient
from spolia_node.store_stream import FetchedChunk

TENANT = "tenant"
FINGERPRINT = b"f" * 32
CODECS = ("raw",)


def soon() -> Deadline:
    """The deadline of a call that should not fail by it."""
    return Deadline.after(20.0)


@dataclass(frozen=True)
class Chunk:
    """A chunk object and what is said of it."""

    chunk_id: bytes
    data: bytes
    info: ObjectInfo


def make_chunk(number: int, num_tokens: int = 8, head_dim: int = 4) -> Chunk:
    """A real object with random KV, the same for the same arguments. With `head_dim` 256, 8 KiB per token."""
    shape = KvShape(num_layers=2, num_kv_heads=2, head_dim=head_dim, v_dim=head_dim, dtype="F32")
    meta = ChunkMeta(number.to_bytes(32, "big"), ChunkKind.LOCAL, FINGERPRINT, num_tokens, shape)
    source = random.Random(number)
    sizes = (shape.key_bytes(num_tokens), shape.value_bytes(num_tokens))
    layers = [(memoryview(source.randbytes(sizes[0])), memoryview(source.randbytes(sizes[1]))) for _ in range(2)]
    data = build_chunk_object(meta, layers)
    return Chunk(meta.chunk_id, data, object_info(meta, data))


@asynccontextmanager
async def running_store(**settings: Any) -> AsyncIterator[KVStoreNode]:
    """A kvstore node, ended without waiting for anyone; ending it earlier is fine."""
    node = KVStoreNode(KVStoreConfig(**settings))
    try:
        await node.start()
        yield node
    finally:
        await end_at_once(node)


async def end_at_once(node: KVStoreNode) -> None:
    """What a crash looks like from outside: connections close, nobody is told."""
    await node.server.stop_at_once()
    await node.close()


class LyingStore(KVStoreServiceServicer):
    """Answers every Get with `responses`, whatever was asked; then, with `and_hang`, never ends the stream."""

    def __init__(self, responses: Sequence[GetResponse], and_hang: bool) -> None:
        self._responses = responses
        self._and_hang = and_hang

    async def Get(self, request: Any, context: Any) -> AsyncIterator[GetResponse]:
        """The lie."""
        for response in self._responses:
            yield response
        if self._and_hang:
            await asyncio.Event().wait()


@asynccontextmanager
async def lying_store(responses: Sequence[GetResponse], *, and_hang: bool = False) -> AsyncIterator[NodeServer]:
    """A server with a `LyingStore`."""
    server = NodeServer(NodeConfig(), "kvstore")
    store = LyingStore(responses, and_hang)
    server.add(lambda to: add_KVStoreServiceServicer_to_server(store, to), "spolia.v1.KVStoreService")
    try:
        await server.start()
        yield server
    finally:
        await server.stop_at_once()


async def eventually(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds; fails after a while. For what happens on the far side of a connection."""
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - a server has no event for "the client has gone"
            await asyncio.sleep(0.005)


async def fetch(client: StoreClient, *ids: bytes) -> list[FetchedChunk]:
    """All that comes of one Get."""
    return [chunk async for chunk in client.get(TENANT, ids, FINGERPRINT, CODECS, soon())]
