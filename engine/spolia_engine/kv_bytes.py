"""KV between pool memory and bytes: chunk objects and single layers, laid out [num_kv_heads, num_tokens, width]."""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_core.chunk_object import ChunkMeta, KvShape, ParsedChunk, build_chunk_object
from spolia_core.errors import DataCorrupt
from spolia_engine.pool import Extent
from spolia_engine.run import Run


def run_to_object(run: Run, meta: ChunkMeta) -> bytes:
    """A chunk object of a run. Copies the KV once, out of pool memory."""
    layers = [(memoryview(k), memoryview(v)) for k, v in (layer_of_run(run, i) for i in range(meta.shape.num_layers))]
    return build_chunk_object(meta, layers)


def layer_of_run(run: Run, layer: int) -> tuple[bytes, bytes]:
    """K and V bytes of one layer of a run."""
    slots = slice(run.start, run.start + run.num_tokens)
    return _to_bytes(run.extent.key[layer][:, slots]), _to_bytes(run.extent.value[layer][:, slots])


def write_object(extent: Extent, start: int, chunk: ParsedChunk, shape: KvShape) -> None:
    """Copies a chunk's KV into slots `start` … of an extent. Raises `DataCorrupt` when its shape is not the pool's."""
    if chunk.meta.shape != shape:
        raise DataCorrupt(
            f"chunk {chunk.meta.chunk_id.hex()} has shape {chunk.meta.shape}, this node's is {shape}", field="shape"
        )
    for layer, (key, value) in enumerate(chunk.layers):
        write_layer(extent, start, layer, chunk.meta.num_tokens, key, value)


def write_layer(
    extent: Extent, start: int, layer: int, num_tokens: int, key: bytes | memoryview, value: bytes | memoryview
) -> None:
    """Copies one layer's K and V bytes into slots `start` … of an extent."""
    slots = slice(start, start + num_tokens)
    for memory, data in ((extent.key[layer], key), (extent.value[layer], value)):
        target = memory[:, slots]
        target.copy_(torch.frombuffer(data, dtype=memory.dtype).view(target.shape))


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
