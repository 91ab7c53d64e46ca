"""Chunk object, format 1: a safetensors file whose tensors are ours to place.

    8 bytes   header length, little-endian
    header    JSON: "__metadata__" and, per layer l, "l.k" [num_kv_heads, num_tokens, head_dim] and "l.v" [.., v_dim]
    data      layer 0 K, layer 0 V, layer 1 K, …: contiguous, so any layer can be mapped or sent alone

The same bytes serve in RAM, on disk and on the wire. Any safetensors reader can open them. This module writes the
header itself, since safetensors' own writer orders tensors by name and dtype; the format allows any order without
holes (safetensors README, "Format"). The metadata carries digests of each layer and of itself: a flipped bit anywhere
is found, or changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from spolia_core.digests import digest
from spolia_core.errors import DataCorrupt, NotSupported
from spolia_core.ids import FORMAT_VERSION, ID_BYTES
from spolia_core.reuse import ChunkKind

RAW_CODEC = "raw"
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES = 16 << 20
METADATA_DIGEST = "spolia.metadata_digest"


@dataclass(frozen=True, slots=True)
class KvShape:
    """Shape of KV, the same for every layer of a model. `dtype` is a safetensors name."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str

    def key_bytes(self, num_tokens: int) -> int:
        """Bytes of one layer's keys."""
        return self.num_kv_heads * num_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    def value_bytes(self, num_tokens: int) -> int:
        """Bytes of one layer's values."""
        return self.num_kv_heads * num_tokens * self.v_dim * DTYPE_BYTES[self.dtype]

    def layer_bytes(self, num_tokens: int) -> int:
        """Bytes of one layer, K and V."""
        return self.key_bytes(num_tokens) + self.value_bytes(num_tokens)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return self.num_layers * self.layer_bytes(1)


@dataclass(frozen=True, slots=True)
class ChunkMeta:
    """What a chunk object is. `rope_base` is the position to which key 0 is rotated: 0 for local chunks."""

    chunk_id: bytes
    kind: ChunkKind
    fingerprint: bytes
    num_tokens: int
    shape: KvShape
    rope_base: int = 0
    codec: str = RAW_CODEC
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class ParsedChunk:
    """A chunk object opened in place: `layers[l]` is (K bytes, V bytes), views of the object."""

    meta: ChunkMeta
    layers: tuple[tuple[memoryview, memoryview], ...]


def build_chunk_object(meta: ChunkMeta, layers: Sequence[tuple[memoryview, memoryview]]) -> bytes:
    """Serialises KV. `layers[l]` is (K bytes, V bytes) in the layout above; digests are taken here, per layer."""
    shape = meta.shape
    if len(layers) != shape.num_layers:
        raise AssertionError(f"{len(layers)} layers given, shape says {shape.num_layers}")
    sizes = (shape.key_bytes(meta.num_tokens), shape.value_bytes(meta.num_tokens))
    for index, (key, value) in enumerate(layers):
        if (len(key), len(value)) != sizes:
            raise AssertionError(f"layer {index} has {len(key)} + {len(value)} bytes, its shape says {sizes}")
    digests = [digest(b"".join(pair)).hex() for pair in layers]
    head = _encode_header(meta, digests)
    return b"".join([head, *(view for pair in layers for view in pair)])


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """What stands before the KV of an object: all that a reader needs to check the rest as it comes."""

    meta: ChunkMeta
    layer_digests: tuple[bytes, ...]
    size_bytes: int
    """Of the head itself; layer 0 begins there."""


def head_bytes(start: bytes | bytearray | memoryview, total_bytes: int) -> int:
    """How long the head of an object of `total_bytes` is, from its first 8 bytes. Raises `DataCorrupt`."""
    size = int.from_bytes(start[:8], "little") if len(start) >= 8 else -1
    if not 2 <= size <= min(MAX_HEADER_BYTES, total_bytes - 8):
        raise DataCorrupt("chunk object has no readable header", field="header")
    return 8 + size


def parse_head(head: bytes | bytearray | memoryview, total_bytes: int) -> ChunkHead:
    """Opens a whole head (`head_bytes` of it) of an object of `total_bytes`.

    Raises `NotSupported` for an unknown format version or codec, `DataCorrupt` for anything that is no well-formed head
    of an object of that length.
    """
    header = _decode_header(bytes(head[8:]))
    raw = header.pop("__metadata__", None)
    meta, digests = _meta_of(raw)
    if meta.shape.num_layers > len(header) or header != _tensor_entries(meta):
        raise DataCorrupt("chunk object's tensors are not laid out as format 1 says", field="header")
    size = meta.shape.num_layers * meta.shape.layer_bytes(meta.num_tokens)
    if total_bytes - len(head) != size:
        message = f"chunk object holds {total_bytes - len(head)} bytes of KV, its header says {size}"
        raise DataCorrupt(message, field="size")
    return ChunkHead(meta, digests, len(head))


def parse_chunk_object(data: bytes | bytearray | memoryview, *, verify: bool = True) -> ParsedChunk:
    """Opens an object without copying it.

    Raises `NotSupported` for an unknown format version or codec, `DataCorrupt` for anything that is not a well-formed
    object of its own header, or (with `verify`) a layer that does not match its digest. Whether it is the chunk that
    was asked for is the caller's question: compare `meta`.
    """
    view = memoryview(data).cast("B")
    head = parse_head(view[: head_bytes(view, len(view))], len(view))
    meta, body = head.meta, view[head.size_bytes :]
    layers = []
    key_bytes, layer_bytes = meta.shape.key_bytes(meta.num_tokens), meta.shape.layer_bytes(meta.num_tokens)
    for index in range(meta.shape.num_layers):
        layer = body[index * layer_bytes : (index + 1) * layer_bytes]
        if verify:
            check_layer(head, index, digest(layer))
        layers.append((layer[:key_bytes], layer[key_bytes:]))
    return ParsedChunk(meta, tuple(layers))


def check_layer(head: ChunkHead, index: int, layer_digest: bytes) -> None:
    """Raises `DataCorrupt`, naming the layer, when its bytes have another digest than the head says."""
    if layer_digest != head.layer_digests[index]:
        raise DataCorrupt(
            f"digest of layer {index} of chunk {head.meta.chunk_id.hex()} does not match", field=f"layer {index}"
        )


def _tensor_entries(meta: ChunkMeta) -> dict[str, dict[str, object]]:
    shape, n, offset = meta.shape, meta.num_tokens, 0
    entries: dict[str, dict[str, object]] = {}
    for index in range(shape.num_layers):
        for name, width, size in (
            ("k", shape.head_dim, shape.key_bytes(n)),
            ("v", shape.v_dim, shape.value_bytes(n)),
        ):
            entries[f"{index}.{name}"] = {
                "dtype": shape.dtype,
                "shape": [shape.num_kv_heads, n, width],
                "data_offsets": [offset, offset + size],
            }
            offset += size
    return entries


def _encode_header(meta: ChunkMeta, digests: Sequence[str]) -> bytes:
    shape = meta.shape
    metadata: dict[str, object] = {
        "spolia.format_version": str(meta.format_version),
        "spolia.chunk_id": meta.chunk_id.hex(),
        "spolia.kind": meta.kind.name,
        "spolia.fingerprint": meta.fingerprint.hex(),
        "spolia.num_tokens": str(meta.num_tokens),
        "spolia.rope_base": str(meta.rope_base),
        "spolia.codec": meta.codec,
        "spolia.shape": f"{shape.num_layers},{shape.num_kv_heads},{shape.head_dim},{shape.v_dim},{shape.dtype}",
        "spolia.layer_digests": ",".join(digests),
    }
    metadata[METADATA_DIGEST] = _metadata_digest(metadata)
    header: dict[str, object] = {"__metadata__": metadata, **_tensor_entries(meta)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start 8-byte aligned, as safetensors' own writer does
    return len(text).to_bytes(8, "little") + text


def _metadata_digest(metadata: dict[str, object]) -> str:
    """Of every entry but itself, whatever their order in the file."""
    covered = sorted((name, value) for name, value in metadata.items() if name != METADATA_DIGEST)
    return digest(json.dumps(covered).encode()).hex()


def _decode_header(text: bytes) -> dict[str, object]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # brackets nested too deep are no header of ours either
        raise DataCorrupt(f"chunk object's header is not JSON: {error}", field="header") from error
    if not isinstance(header, dict):
        raise DataCorrupt("chunk object's header is not an object", field="header")
    return header


def _meta_of(raw: object) -> tuple[ChunkMeta, tuple[bytes, ...]]:
    if not isinstance(raw, dict):
        raise DataCorrupt("chunk object has no metadata", field="__metadata__")
    version, codec = raw.get("spolia.format_version"), raw.get("spolia.codec")
    if version != str(FORMAT_VERSION):
        raise NotSupported(f"chunk object format {version!r} is unknown", field="format_version", actual=str(version))
    if codec != RAW_CODEC:
        raise NotSupported(f"codec {codec!r} is unknown", field="codec", actual=str(codec))
    if raw.get(METADATA_DIGEST) != _metadata_digest(raw):
        raise DataCorrupt("digest of the chunk object's metadata does not match", field="__metadata__")
    try:
        layers, heads, head_dim, v_dim, dtype = raw["spolia.shape"].split(",")
        shape = KvShape(int(layers), int(heads), int(head_dim), int(v_dim), dtype)
        meta = ChunkMeta(
            chunk_id=bytes.fromhex(raw["spolia.chunk_id"]),
            kind=ChunkKind[raw["spolia.kind"]],
            fingerprint=bytes.fromhex(raw["spolia.fingerprint"]),
            num_tokens=int(raw["spolia.num_tokens"]),
            shape=shape,
            rope_base=int(raw["spolia.rope_base"]),
        )
        digests = tuple(bytes.fromhex(text) for text in raw["spolia.layer_digests"].split(","))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataCorrupt(f"chunk object's metadata is incomplete: {error!r}", field="__metadata__") from error
    sizes = (meta.num_tokens, shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.v_dim)
    if min(sizes) < 1 or shape.dtype not in DTYPE_BYTES or len(meta.chunk_id) != ID_BYTES:
        raise DataCorrupt("chunk object's metadata is out of range", field="__metadata__")
    if len(digests) != shape.num_layers:
        raise DataCorrupt("chunk object has not one digest per layer", field="spolia.layer_digests")
    return meta, digests
