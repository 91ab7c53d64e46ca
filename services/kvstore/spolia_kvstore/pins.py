"""Pins: leases that keep objects from eviction. Time comes in as an argument, in seconds of any monotonic clock."""

from __future__ import annotations

from collections.abc import Iterator

from spolia_kvstore.objects import ObjectKey
from spolia_kvstore.owners import belongs_to


class Pins:
    """Who keeps what, until when. Several owners may pin one object; it is pinned while any lease lives."""

    def __init__(self) -> None:
        self._leases: dict[ObjectKey, dict[str, float]] = {}

    def pin(self, key: ObjectKey, owner: str, until: float) -> None:
        """Pins, or renews the owner's pin; the new lease replaces the old one, longer or shorter."""
        self._leases.setdefault(key, {})[owner] = until

    def unpin(self, key: ObjectKey, owner: str, now: float) -> bool:
        """Ends the owner's pin. False when it had none that lives."""
        until = self._leases.get(key, {}).pop(owner, None)
        if not self._leases.get(key, True):
            del self._leases[key]
        return until is not None and until > now

    def drop(self, key: ObjectKey) -> list[str]:
        """Ends every pin of an object that is gone. Returns the owners."""
        return list(self._leases.pop(key, {}))

    def end_of_node(self, node_id: str) -> list[tuple[ObjectKey, str]]:
        """Ends the pins of a node that is gone. Returns them."""
        gone = [(key, owner) for key, owners in self._leases.items() for owner in owners if belongs_to(owner, node_id)]
        for key, owner in gone:
            self.unpin(key, owner, now=0.0)
        return gone

    def is_pinned(self, key: ObjectKey, now: float) -> bool:
        """Whether any lease lives."""
        return any(until > now for until in self._leases.get(key, {}).values())

    def of(self, key: ObjectKey, now: float) -> list[tuple[str, float]]:
        """Owners that pin it, with what is left of each lease in seconds."""
        return [(owner, until - now) for owner, until in self._leases.get(key, {}).items() if until > now]

    def sweep(self, now: float) -> list[tuple[ObjectKey, str]]:
        """Forgets leases that have run out. Returns them."""
        gone = [(key, owner) for key, owner, until in self._all() if until <= now]
        for key, owner in gone:
            self.unpin(key, owner, now)
        return gone

    def num_live(self, now: float) -> int:
        """Live pins, counted per owner."""
        return sum(until > now for _, _, until in self._all())

    def _all(self) -> Iterator[tuple[ObjectKey, str, float]]:
        for key, owners in list(self._leases.items()):
            for owner, until in list(owners.items()):
                yield key, owner, until
