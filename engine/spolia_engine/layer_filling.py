"""A layer of a chunk on its way into pool memory: each piece goes straight to where it will be read."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from spolia_engine.extent import Extent
from spolia_engine.kv_bytes import write_layer


class LayerFilling:
    """Takes the bytes of one layer, keys and then values, in order, into the first `num_tokens` slots of an extent.

    The layer may be read after `finish`, and not before: until then its bytes are not known to be right. Where it does
    not lie in one piece, or on a device, they are collected, and written then.
    """

    def __init__(self, extent: Extent, layer: int, num_tokens: int) -> None:
        self._extent = extent
        self._layer = layer
        self._num_tokens = num_tokens
        self._digest = xxhash.xxh3_128()
        parts = list(extent.parts(0, num_tokens))
        key, value = [part.key[layer] for part in parts], [part.value[layer] for part in parts]
        self._key_bytes = sum(tensor.nbytes for tensor in key)
        self._num_bytes = self._key_bytes + sum(tensor.nbytes for tensor in value)
        self._num_taken = 0
        self._collected: bytearray | None = None
        if len(parts) == 1 and _lies_open(key[0]) and _lies_open(value[0]):
            self._places = [(0, _bytes_of(key[0])), (self._key_bytes, _bytes_of(value[0]))]
        else:
            self._collected = bytearray(self._num_bytes)
            self._places = [(0, memoryview(self._collected))]

    @property
    def is_full(self) -> bool:
        """Whether all bytes have come."""
        return self._num_taken == self._num_bytes

    def take(self, data: memoryview) -> int:
        """Takes what belongs to the layer from the beginning of `data`; how many bytes that was."""
        start = self._num_taken
        mine = data[: self._num_bytes - start]
        self._digest.update(mine)
        end = start + len(mine)
        for first, memory in self._places:
            low, high = max(start, first), min(end, first + len(memory))
            if low < high:
                memory[low - first : high - first] = mine[low - start : high - start]
        self._num_taken = end
        return len(mine)

    @property
    def digest(self) -> bytes:
        """Of the bytes that have come."""
        return self._digest.digest()

    def finish(self) -> None:
        """The bytes, all of which have come, are what they should be: the layer may be read."""
        assert self.is_full, "a layer is read whole or not at all"
        if self._collected is not None:
            data = memoryview(self._collected)
            key, value = data[: self._key_bytes], data[self._key_bytes :]
            write_layer(self._extent, 0, self._layer, self._num_tokens, key, value)


def _lies_open(tensor: Tensor) -> bool:
    """Whether its bytes lie in this process's memory, one behind the other."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().reshape(-1).data
