"""How much free memory a pool on a CPU holds on to: pages of slots for the next tails, pieces for the next extents."""

from __future__ import annotations

from spolia_engine.kept_memory import KeptMemory
from spolia_engine.slab import Slabs

KEPT_SHARE = 1 / 8
"""Of the pool's memory: how much of what is free is kept for the next extents. Of the default pool that is 128 MiB."""
MAX_WARM_SHARE = 1 / 16
"""Of a pool: free memory that stays in pages for the next tails, as far as so many blocks are free. Of a pool of 1 GiB
that is 64 MiB: 64 sequences of 128 tokens (4 layers, 4 KV heads of 64)."""


class IdleMemory:
    """Bounds what is warm (`slab`) and what is kept (`kept_memory`). Called under the pool's lock."""

    def __init__(self, slabs: Slabs, kept: KeptMemory | None, pool_bytes: int, max_warm_bytes: int | None) -> None:
        """`kept` is None where there is none; `max_warm_bytes` None is `MAX_WARM_SHARE` of the pool."""
        self._slabs = slabs
        self._kept = kept
        self._max_kept_bytes = int(pool_bytes * KEPT_SHARE)
        self._max_warm_bytes = int(pool_bytes * MAX_WARM_SHARE) if max_warm_bytes is None else max_warm_bytes

    def limit(self, free_bytes: int) -> None:
        """Gives back what is more than the bounds, or than `free_bytes`, the pool's memory that is free now.

        So who takes free memory gets it, and the pool's memory never makes more than its budget. What is kept goes
        first: a slot is small, and soon wanted.
        """
        self._slabs.limit_warm(min(self._max_warm_bytes, free_bytes))
        if self._kept is not None:
            self._kept.trim(min(self._max_kept_bytes, free_bytes - self._slabs.warm_bytes))
