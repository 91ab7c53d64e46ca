"""Tiny worlds for the store's tests: real chunk objects, records, a clock that is set by hand, a running node."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from spolia.v1.common_pb2 import ObjectInfo
from spolia.v1.kvstore_pb2 import PutHeader
from spolia_core.chunk_object import ChunkMeta, KvShape, build_chunk_object
from spolia_core.digests import digest
from spolia_core.reuse import ChunkKind
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.node import KVStoreNode
from spolia_kvstore.objects import ObjectKey, ObjectRecord
from spolia_kvstore.ram_tier import StoredObject
from spolia_kvstore.wire import record_of
from spolia_node.rpc_messages import object_info

TENANT = "tenant"
FINGERPRINT = b"f" * 32


@dataclass(frozen=True)
class Chunk:
    chunk_id: bytes
    data: bytes
    info: ObjectInfo


def make_chunk(
    number: int,
    num_tokens: int = 8,
    head_dim: int = 4,
    fingerprint: bytes = FINGERPRINT,
    *,
    kind: ChunkKind = ChunkKind.LOCAL,
    rope_base: int = 0,
    compute_s: float = 0.0,
) -> Chunk:
    """A real chunk object with random KV, the same for the same arguments."""
    shape = KvShape(num_layers=2, num_kv_heads=2, head_dim=head_dim, v_dim=head_dim, dtype="F32")
    meta = ChunkMeta(number.to_bytes(32, "big"), kind, fingerprint, num_tokens, shape, rope_base)
    source = random.Random(number)
    layers = [
        (
            memoryview(source.randbytes(shape.key_bytes(num_tokens))),
            memoryview(source.randbytes(shape.value_bytes(num_tokens))),
        )
        for _ in range(shape.num_layers)
    ]
    data = build_chunk_object(meta, layers)
    return Chunk(meta.chunk_id, data, object_info(meta, data, compute_s=compute_s))


def make_big_chunk(number: int, mebibytes: int = 8) -> Chunk:
    """One that fills any flow-control window: 8 KiB per token."""
    return make_chunk(number, num_tokens=mebibytes * 128, head_dim=256)


def make_record(number: int, size_bytes: int, tenant_id: str = TENANT) -> ObjectRecord:
    """A record for those that never look at the bytes."""
    return ObjectRecord(
        key=ObjectKey(tenant_id, number.to_bytes(32, "big")),
        kind=ChunkKind.LOCAL,
        format_version=1,
        codec="raw",
        fingerprint=FINGERPRINT,
        num_tokens=8,
        size_bytes=size_bytes,
        digest=digest(bytes(size_bytes)),
    )


class HandClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running_node(**settings: object) -> AsyncIterator[KVStoreNode]:
    """A kvstore node on a free port, ended without waiting for anyone."""
    settings = {"log_level": "error", **settings}
    node = KVStoreNode(KVStoreConfig(**settings))  # type: ignore[arg-type]  # fields differ in type
    try:
        await node.start()
        yield node
    finally:
        await node.server.stop_at_once()
        await node.close()


def announced(chunk: Chunk, tenant_id: str = TENANT) -> ObjectRecord:
    """What a Put of this chunk announces."""
    return record_of(PutHeader(tenant_id=tenant_id, info=chunk.info))


def key_of(chunk: Chunk, tenant_id: str = TENANT) -> ObjectKey:
    """A chunk's name in a store."""
    return ObjectKey(tenant_id, chunk.chunk_id)


def fresh_id() -> bytes:
    """An id nobody has."""
    return os.urandom(32)


def object_of(node: KVStoreNode, chunk: Chunk) -> StoredObject:
    """A stored object, for tests that look at its bytes or damage them."""
    stored = node.store.tiers.ram.find(ObjectKey(TENANT, chunk.chunk_id))
    assert stored is not None
    return stored


def damage(stored: StoredObject, at: int) -> None:
    """Flips a bit of an object in memory."""
    (piece,) = stored.extent.pieces(at % stored.size, at % stored.size + 1)
    piece[0] ^= 1


async def eventually(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds; fails after a while. For what happens on the far side of a connection."""
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - a server has no event for "the client has gone"
            await asyncio.sleep(0.005)
