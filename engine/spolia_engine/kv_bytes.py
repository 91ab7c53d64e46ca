"""KV between pool memory and bytes: chunk objects and single layers, laid out [num_kv_heads, num_tokens, width]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spolia_core.chunk_object import ChunkMeta, KvShape, ParsedChunk, build_chunk_object
from spolia_core.errors import DataCorrupt
from spolia_engine.extent import Extent
from spolia_engine.run import Run


def run_to_object(run: Run, meta: ChunkMeta) -> bytes:
    """A chunk object of a run, a copy of its KV. The caller holds a reference on the run meanwhile."""
    layers = [(memoryview(k), memoryview(v)) for k, v in (layer_of_run(run, i) for i in range(meta.shape.num_layers))]
    return build_chunk_object(meta, layers)


def layer_of_run(run: Run, layer: int) -> tuple[bytes, bytes]:
    """K and V bytes of one layer of a run."""
    key, value = run.extent.read(layer, run.start, run.start + run.num_tokens)
    return _to_bytes(key), _to_bytes(value)


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
    """Copies one layer's K and V bytes into slots `start` … of an extent that has them.

    Raises `DataCorrupt`, with nothing written, when a length is not that of `num_tokens` tokens.
    """
    parts = list(extent.parts(start, start + num_tokens))
    pairs = (([part.key[layer] for part in parts], key), ([part.value[layer] for part in parts], value))
    for memory, data in pairs:
        expected = sum(target.numel() * target.element_size() for target in memory)
        if len(data) != expected:
            raise DataCorrupt(
                f"layer {layer} has {len(data)} bytes, {num_tokens} tokens are {expected}", field=f"layer {layer}"
            )
    for memory, data in pairs:
        # Through numpy, which reads what it must not write; torch warns of every read-only buffer.
        source = np.frombuffer(data, dtype=np.uint8).reshape(memory[0].shape[0], num_tokens, -1)
        for part, target in zip(parts, memory, strict=True):
            _copy_bytes(target, source[:, part.start - start : part.end - start])


def hidden_to_bytes(hidden: Tensor) -> bytes:
    """A hidden state [hidden] as it is kept, in the model's dtype."""
    return _to_bytes(hidden)


def hidden_from_bytes(data: bytes, width: int, dtype: torch.dtype) -> Tensor:
    """The hidden state [width] that these bytes are. Raises `DataCorrupt` for another length."""
    if len(data) != width * dtype.itemsize:
        raise DataCorrupt(f"a hidden state of {len(data)} bytes, this model's has {width * dtype.itemsize}")
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _copy_bytes(target: Tensor, source: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    raw = target.view(torch.uint8)
    if raw.device.type == "cpu":
        raw.numpy()[...] = source
    else:
        raw.copy_(torch.from_numpy(source.copy()))


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
