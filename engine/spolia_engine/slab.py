"""Memory for what sequences write: equal slots side by side, so that one attention call reads many sequences.

A slot holds what one sequence alone reads: KV of its own prompt tokens, moved in when it begins to decode, and behind
it the answer's. Slots of a slab stand at equal distances, which is what makes them a batch. A slab's memory is zero
where nothing was written yet: no pages are taken for it, and attention behind a mask meets no numbers that are not.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from spolia_core.chunk_object import KvShape
from spolia_engine.lazy_memory import LazyZeros

MIN_CAPACITY = 64
MAX_SLOTS = 64
MAX_SLAB_BYTES = 1 << 30
MAX_LAZY_SLAB_BYTES = 4 << 30
"""On a CPU: of addresses, not of memory, since pages are taken as they are written. Enough for `MAX_SLOTS` of 1,024
tokens of a model with 64 KiB a token: one batch, one attention call."""


class Slot:
    """Room for `capacity` tokens of one sequence; `users` extents lie in it, and it is free when none does."""

    __slots__ = ("index", "slab", "users")

    def __init__(self, slab: Slab, index: int) -> None:
        self.slab = slab
        self.index = index
        self.users = 0

    @property
    def key(self) -> Tensor:
        """[num_layers, num_kv_heads, capacity, head_dim], a view."""
        return self.slab.key[:, self.index]

    @property
    def value(self) -> Tensor:
        """[num_layers, num_kv_heads, capacity, v_dim], a view."""
        return self.slab.value[:, self.index]


class Slab:
    """`key` [num_layers, num_slots, num_kv_heads, capacity, head_dim], `value` the same with v_dim."""

    def __init__(self, shape: KvShape, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        slot_bytes = shape.bytes_per_token * capacity
        most_bytes = MAX_LAZY_SLAB_BYTES if device.type == "cpu" else MAX_SLAB_BYTES
        self.num_slots = max(1, min(MAX_SLOTS, most_bytes // slot_bytes))
        self.capacity = capacity
        size = (shape.num_layers, self.num_slots, shape.num_kv_heads, capacity)
        self._memory = [LazyZeros((*size, width), dtype, device) for width in (shape.head_dim, shape.v_dim)]
        self.key, self.value = (memory.tensor for memory in self._memory)
        self.free = list(range(self.num_slots))

    @property
    def is_empty(self) -> bool:
        """Whether no slot is taken."""
        return len(self.free) == self.num_slots

    def clear(self, index: int) -> None:
        """Makes a slot zero again. Its pages go: what the ledger calls free is."""
        for memory in self._memory:
            for layer in memory.tensor:
                memory.clear(layer[index])


class Slabs:
    """Slabs by capacity, a power of two. Not thread-safe: its owner is."""

    def __init__(self, shape: KvShape, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._slabs: dict[int, list[Slab]] = {}

    @property
    def num_slabs(self) -> int:
        """Slabs with at least one slot taken."""
        return sum(map(len, self._slabs.values()))

    def take(self, num_tokens: int) -> Slot:
        """The lowest free slot for so many tokens: those of a batch lie side by side. The caller is its first user."""
        capacity = max(MIN_CAPACITY, 1 << (num_tokens - 1).bit_length())
        slabs = self._slabs.setdefault(capacity, [])
        slab = next((slab for slab in slabs if slab.free), None)
        if slab is None:
            slab = Slab(self._shape, capacity, self._dtype, self._device)
            slabs.append(slab)
        slot = Slot(slab, heapq.heappop(slab.free))
        slot.users = 1
        return slot

    def leave(self, slot: Slot) -> None:
        """One user less. A slot without any is zero again; a slab without any is gone, its pages with it."""
        slot.users -= 1
        if slot.users:
            return
        slab = slot.slab
        heapq.heappush(slab.free, slot.index)
        if slab.is_empty:
            self._slabs[slab.capacity].remove(slab)
        else:
            slab.clear(slot.index)
