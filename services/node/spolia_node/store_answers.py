"""What several stores answered to one question, taken together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from spolia.v1.kvstore_pb2 import DeleteResponse, TierCount
from spolia_core.errors import SpoliaError, Unavailable
from spolia_node.store_address import StoreAddress

T = TypeVar("T")


def some_of(answers: Mapping[StoreAddress, T | SpoliaError]) -> list[T]:
    """The answers of the stores that gave one. Raises `Unavailable` when none did."""
    given = [answer for answer in answers.values() if not isinstance(answer, SpoliaError)]
    return given or all_of(answers)


def all_of(answers: Mapping[StoreAddress, T | SpoliaError]) -> list[T]:
    """The answers of all stores. Raises `Unavailable` naming those that could not be asked: in `actual` by their node
    ids, in its message, which is for logs and operators, by their addresses where there is no more.
    """
    failed = {store: answer for store, answer in answers.items() if isinstance(answer, SpoliaError)}
    if failed:
        reasons = "; ".join(f"{store.name}: {error.message}" for store, error in failed.items())
        names = ", ".join(store.node_id for store in failed if store.node_id)
        raise Unavailable(f"not every store could be asked: {reasons}", field="stores", actual=names)
    return [answer for answer in answers.values() if not isinstance(answer, SpoliaError)]


def sum_deleted(responses: Iterable[DeleteResponse]) -> DeleteResponse:
    """What was dropped in all."""
    total = DeleteResponse()
    by_tier: dict[int, TierCount] = {}
    for response in responses:
        total.num_deleted += response.num_deleted
        total.bytes_deleted += response.bytes_deleted
        _add_tiers(by_tier, response.tiers)
    total.tiers.extend(by_tier[tier] for tier in sorted(by_tier))
    return total


def _add_tiers(by_tier: dict[int, TierCount], counts: Iterable[TierCount]) -> None:
    """Adds counts to those of their tiers."""
    for count in counts:
        known = by_tier.setdefault(count.tier, TierCount(tier=count.tier))
        known.num_objects += count.num_objects
        known.num_bytes += count.num_bytes
