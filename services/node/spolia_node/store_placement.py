"""Where a chunk belongs: rendezvous hashing, so that every node finds the same store without asking anyone.

Each store draws a weight for each id; the highest is the id's home, the next takes over where that one is away. When a
store leaves, only its own ids move; when one joins, it takes an equal share from each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from spolia_node.store_address import StoreAddress


def open_stores(stores: Sequence[StoreAddress]) -> list[StoreAddress]:
    """Those that take objects now; all, where none does: one of them may answer after all."""
    return [store for store in stores if store.is_open] or list(stores)


def in_order(chunk_id: bytes, stores: Iterable[StoreAddress]) -> list[StoreAddress]:
    """`stores`, home first. The same in every process, whatever order they come in."""
    return sorted(stores, key=lambda store: (-_weight(chunk_id, store), store.name))


def _weight(chunk_id: bytes, store: StoreAddress) -> int:
    return xxhash.xxh3_64_intdigest(chunk_id + store.name.encode())
