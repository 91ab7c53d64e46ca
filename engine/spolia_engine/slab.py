"""Memory for what sequences write: equal slots side by side, so that one attention call reads many sequences.

A slot holds what one sequence alone reads: KV of its own prompt tokens, moved in when it begins to decode, and behind
it the answer's. Slots of a slab stand at equal distances, which is what makes them a batch. A slab's memory is zero
where nothing was written yet: no pages are taken for it, and attention behind a mask meets no numbers that are not.

A slot that is left is zero before anybody may take it again, so nobody ever meets what another wrote. Its pages go back
to the system, or stay for the next one who takes it: **warm**, within a bound that its owner sets. Pages taken anew are
what a sequence's begin and end cost (docs/decode.md has figures).

    taken ──leave, room left──▶ free, warm ──take──▶ taken
      ▲  └──leave, no room─────────▶ free ◀── limit_warm, or others left later
      └───────────── take ────────────┘
"""

from __future__ import annotations

import heapq
import mmap
from itertools import count

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

    __slots__ = ("index", "num_written", "slab", "users")

    def __init__(self, slab: Slab, index: int) -> None:
        self.slab = slab
        self.index = index
        self.users = 0
        self.num_written = slab.capacity
        """Tokens from the first on that may have been written: all, or more, unless who hands it out knows better."""

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
        self.warm: dict[int, int] = {}
        """Free slots that keep their pages, and how many bytes of them."""
        self.used_at = 0
        """When a slot of it was last taken or left, on its owner's count."""

    @property
    def is_empty(self) -> bool:
        """Whether no slot is taken."""
        return len(self.free) == self.num_slots

    def page_bytes(self, num_tokens: int) -> int:
        """Bytes of pages that the first tokens of a slot lie in, at most: its heads are apart in memory."""
        return sum(_page_bytes(memory.tensor, num_tokens) for memory in self._memory)

    def wipe(self, index: int, num_tokens: int) -> None:
        """Makes the first tokens of a slot zero. Its pages stay."""
        for memory in self._memory:
            memory.tensor[:, index, :, :num_tokens].zero_()

    def clear(self, index: int) -> None:
        """Makes a slot zero again. Its pages go."""
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
        self._uses = count(1)
        self._max_warm_bytes = 0
        self.warm_bytes = 0
        """Of pages that free slots keep."""

    @property
    def num_slabs(self) -> int:
        """Slabs with at least one slot taken."""
        return sum(not slab.is_empty for slab in self._all())

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
        slab.used_at = next(self._uses)
        self.warm_bytes -= slab.warm.pop(slot.index, 0)
        return slot

    def leave(self, slot: Slot) -> None:
        """One user less. A slot without any is zero again, then free; a slab of which none is taken or warm is gone,
        its pages with it.
        """
        slot.users -= 1
        if slot.users:
            return
        slab, index = slot.slab, slot.index
        slab.used_at = next(self._uses)
        num_bytes = slab.page_bytes(slot.num_written)
        stays_warm = self._makes_room(slab, index, num_bytes)
        if stays_warm:
            slab.wipe(index, slot.num_written)
        elif len(slab.free) + 1 < slab.num_slots or slab.warm:
            slab.clear(index)
        heapq.heappush(slab.free, index)  # only now: one that could not be made zero is nobody's any more
        if stays_warm:
            slab.warm[index] = num_bytes
            self.warm_bytes += num_bytes
        self._drop_unused(slab)

    def limit_warm(self, num_bytes: int) -> None:
        """So many bytes may stay warm from now on. What is more goes: of the slab that was used longest ago first,
        and of its slots the highest, as the lowest are taken first.
        """
        self._max_warm_bytes = num_bytes
        while self.warm_bytes > num_bytes:
            slab, index = self._coolest()
            self._cool(slab, index)

    def check_invariants(self) -> None:
        """Asserts that what is warm is zero, counted, and within its bound."""
        assert self.warm_bytes == sum(sum(slab.warm.values()) for slab in self._all())
        assert 0 <= self.warm_bytes <= self._max_warm_bytes
        for slab in self._all():
            assert not slab.is_empty or slab.warm, "a slab that nobody uses"
            assert set(slab.warm) <= set(slab.free), "a slot is taken or warm"
            for memory in (slab.key, slab.value):
                assert not any(memory[:, index].any() for index in slab.warm), "a slot holds what somebody wrote"

    def _all(self) -> list[Slab]:
        return [slab for slabs in self._slabs.values() for slab in slabs]

    def _makes_room(self, slab: Slab, index: int, num_bytes: int) -> bool:
        """Whether a slot that is left keeps its pages; what is to go before it goes."""
        if not 0 < num_bytes <= self._max_warm_bytes:
            return False
        while self.warm_bytes + num_bytes > self._max_warm_bytes:
            coolest, highest = self._coolest()
            if coolest is slab and highest < index:
                return False
            self._cool(coolest, highest)
        return True

    def _coolest(self) -> tuple[Slab, int]:
        slab = min((slab for slab in self._all() if slab.warm), key=lambda slab: slab.used_at)
        return slab, max(slab.warm)

    def _cool(self, slab: Slab, index: int) -> None:
        self.warm_bytes -= slab.warm.pop(index)
        if not slab.is_empty or slab.warm:
            slab.clear(index)
        self._drop_unused(slab)

    def _drop_unused(self, slab: Slab) -> None:
        if slab.is_empty and not slab.warm:
            self._slabs[slab.capacity].remove(slab)


def _page_bytes(memory: Tensor, num_tokens: int) -> int:
    """Bytes of pages that the first tokens of a slot lie in, of memory [num_layers, num_slots, num_kv_heads, capacity,
    width].
    """
    num_layers, _, num_heads, capacity, width = memory.shape
    used, stride = (count * width * memory.itemsize for count in (min(num_tokens, capacity), capacity))
    if not used:
        return 0
    pages = -(-used // mmap.PAGESIZE) + bool(stride % mmap.PAGESIZE)  # one more where it may begin within a page
    return num_layers * num_heads * pages * mmap.PAGESIZE
