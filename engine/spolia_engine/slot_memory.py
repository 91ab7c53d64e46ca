"""A device's KV memory: taken once, at start, in slots, and given out in ranges of pages.

Layer by layer it is what the paged kernels read (`PagedKv`), and any range of it is an extent's memory as on a CPU,
`[layer][kv_head][token][head_dim]`, only that tokens of one head lie further from those of the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spolia_core.chunk_object import KvShape
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_engine.page_arena import PageArena
from spolia_kernels.paged import PagedKv

DEVICE_BLOCK_SIZE = 16
"""Tokens of a page, and so of a block: the least that the paged kernels read."""


class SlotMemory:
    """Slots for `num_pages` pages in every layer. Not thread-safe: the pool is."""

    def __init__(
        self, shape: KvShape, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Raises `NotSupported` for K and V of unequal widths, `InvalidRequest` for pages that kernels cannot read."""
        if shape.head_dim != shape.v_dim:
            raise NotSupported(
                f"keys of {shape.head_dim} and values of {shape.v_dim} numbers; a device's slots hold equal ones",
                field="head_dim",
            )
        if page_size < DEVICE_BLOCK_SIZE or page_size & (page_size - 1):
            raise InvalidRequest(
                f"block_size is {page_size}: on a device a block is a page, a power of two from {DEVICE_BLOCK_SIZE} on",
                field="block_size",
                limit=f"a power of two ≥ {DEVICE_BLOCK_SIZE}",
                actual=str(page_size),
            )
        self.page_size = page_size
        self.arena = PageArena(num_pages)
        size = (shape.num_layers, shape.num_kv_heads, num_pages * page_size, shape.head_dim)
        # Zeros: kernels may read slots that nobody wrote, and hide them behind a mask.
        self._key, self._value = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.layers = tuple(PagedKv(k, v, page_size) for k, v in zip(self._key, self._value, strict=True))

    def take(self, num_pages: int) -> int | None:
        """The first slot of so many pages; None where no range is free that is as long."""
        page = self.arena.take(num_pages)
        return None if page is None else page * self.page_size

    def give_back(self, slot: int, num_pages: int) -> None:
        """Gives pages back; `slot` lies in the first of them."""
        self.arena.give_back(slot // self.page_size, num_pages)

    def at(self, slot: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots from `slot` on, [num_layers, num_kv_heads, num_tokens, head_dim], views."""
        slots = slice(slot, slot + num_tokens)
        return self._key[:, :, slots], self._value[:, :, slots]
