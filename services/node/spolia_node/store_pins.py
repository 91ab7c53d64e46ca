"""Pins on objects that lie elsewhere than where they belong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from spolia.v1.kvstore_pb2 import LookupEntry
from spolia_core.errors import Unavailable
from spolia_node.deadline import Deadline
from spolia_node.store_address import StoreAddress
from spolia_node.store_routes import Ask, StoreRoutes, together


async def pin_at_holders(
    routes: StoreRoutes, ids: Sequence[bytes], entries: Sequence[LookupEntry], ask: Ask[bool], deadline: Deadline
) -> list[bytes]:
    """Pins each id at the first of the stores its entry names that has it still; the ids that were pinned."""
    holders = {chunk_id: routes.holders(entry) for chunk_id, entry in zip(ids, entries, strict=True)}
    pinned: list[bytes] = []
    while places := _first_of(holders):
        answers = await together([_pin_at(routes, store, some, ask, deadline) for store, some in places.items()])
        found = [chunk_id for some in answers for chunk_id in some]
        pinned += found
        holders = {chunk_id: stores[1:] for chunk_id, stores in holders.items() if chunk_id not in found}
    return pinned


async def _pin_at(
    routes: StoreRoutes, store: StoreAddress, ids: Sequence[bytes], ask: Ask[bool], deadline: Deadline
) -> list[bytes]:
    """The ids that a store has pinned; none when it is away."""
    try:
        answers = await routes.ask_at(store, ids, ask, deadline)
    except Unavailable:
        return []
    return [chunk_id for chunk_id, is_pinned in zip(ids, answers, strict=True) if is_pinned]


def _first_of(holders: dict[bytes, list[StoreAddress]]) -> dict[StoreAddress, list[bytes]]:
    places: defaultdict[StoreAddress, list[bytes]] = defaultdict(list)
    for chunk_id, stores in holders.items():
        if stores:
            places[stores[0]].append(chunk_id)
    return places
