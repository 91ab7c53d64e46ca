"""Real chunk objects of a wanted size, made from a number: the same bytes for the same number, on any machine."""

from __future__ import annotations

import random

from spolia.v1.common_pb2 import ObjectInfo
from spolia_core.chunk_object import ChunkMeta, KvShape, build_chunk_object
from spolia_core.reuse import ChunkKind
from spolia_node.rpc_messages import object_info

FINGERPRINT = b"b" * 32
_SHAPE = KvShape(num_layers=4, num_kv_heads=2, head_dim=64, v_dim=64, dtype="F32")


def chunk_id_of(number: int) -> bytes:
    """The id of object `number`."""
    return random.Random(f"id-{number}").randbytes(32)


def make_object(number: int, num_bytes: int) -> tuple[ObjectInfo, bytes]:
    """Object `number`, of about `num_bytes`."""
    num_tokens = max(1, num_bytes // _SHAPE.bytes_per_token)
    size = _SHAPE.key_bytes(num_tokens)
    pool = random.Random(f"bytes-{number}").randbytes(size + 4096)
    layers = [
        (
            memoryview(pool)[layer * 512 : layer * 512 + size],
            memoryview(pool)[layer * 512 + 256 : layer * 512 + 256 + size],
        )
        for layer in range(_SHAPE.num_layers)
    ]
    meta = ChunkMeta(chunk_id_of(number), ChunkKind.LOCAL, FINGERPRINT, num_tokens, _SHAPE)
    data = build_chunk_object(meta, layers)
    return object_info(meta, data), data
