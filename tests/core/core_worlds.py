"""Small chunk objects for tests."""

from __future__ import annotations

from spolia_core.chunk_object import ChunkMeta, KvShape
from spolia_core.reuse import ChunkKind

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=4, v_dim=2, dtype="F32")


def meta_of(num_tokens: int = 3, shape: KvShape = SHAPE, **changes: object) -> ChunkMeta:
    fields = {
        "rope_base": 0,
        "kind": ChunkKind.LOCAL,
        "chunk_id": bytes(range(32)),
        "fingerprint": bytes(32),
        **changes,
    }
    return ChunkMeta(num_tokens=num_tokens, shape=shape, **fields)  # type: ignore[arg-type]  # fields differ in type


def layers_of(meta: ChunkMeta) -> list[tuple[memoryview, memoryview]]:
    """Bytes that differ from layer to layer and from K to V."""
    shape, n = meta.shape, meta.num_tokens
    return [
        (_bytes(2 * layer, shape.key_bytes(n)), _bytes(2 * layer + 1, shape.value_bytes(n)))
        for layer in range(shape.num_layers)
    ]


def _bytes(seed: int, size: int) -> memoryview:
    return memoryview(bytes((seed * 31 + i * 7) % 251 for i in range(size)))
