"""Slots that stay in pages, and pools of them."""

from __future__ import annotations

import mmap

import pytest

from spolia_core.chunk_object import KvShape
from spolia_engine import lazy_memory
from spolia_engine.extent import Extent
from spolia_engine.pool import Pool
from spolia_engine.slab import Slabs

PAGE = mmap.PAGESIZE
WIDE = KvShape(2, 2, 64, 64, "F32")
"""16 tokens of a head in a page: a slot of up to so many has 8 pages."""
SLOT_BYTES = 8 * PAGE
gives_back = pytest.mark.skipif(not lazy_memory.GIVES_BACK, reason="this system gives no pages back in place")
BLOCK_TOKENS = 4


def warm_slots(world: Slabs) -> list[tuple[int, int]]:
    """(capacity, index) of each."""
    return sorted((slab.capacity, index) for slab in world._all() for index in slab.warm)


def pool_of(num_blocks: int = 64, max_warm_bytes: int | None = 1 << 30) -> Pool:
    return Pool(WIDE, num_blocks=num_blocks, block_size=BLOCK_TOKENS, max_warm_bytes=max_warm_bytes)


def filled(pool: Pool, num_tokens: int, number: float) -> Extent:
    extent = pool.allocate(num_tokens)
    extent.key[:], extent.value[:] = number, -number
    return extent
