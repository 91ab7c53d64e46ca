"""Pins: leases that keep objects from eviction. Time comes in as an argument, in seconds of any monotonic clock."""

from __future__ import annotations

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

    def drop(self, key: ObjectKey) -> None:
        """Ends every pin of an object that is gone."""
        self._leases.pop(key, None)

    def end_of_node(self, node_id: str) -> int:
        """Ends the pins of a node that is gone. Returns how many ended."""
        gone = [(key, owner) for key, owners in self._leases.items() for owner in owners if belongs_to(owner, node_id)]
        for key, owner in gone:
            self.unpin(key, owner, now=0.0)
        return len(gone)

    def is_pinned(self, key: ObjectKey, now: float) -> bool:
        """Whether any lease lives. Forgets those that have run out."""
        owners = self._leases.get(key)
        if owners is None:
            return False
        for owner in [owner for owner, until in owners.items() if until <= now]:
            del owners[owner]
        if not owners:
            del self._leases[key]
        return bool(owners)

    def num_live(self, now: float) -> int:
        """Live pins, counted per owner."""
        return sum(len(self._leases[key]) for key in list(self._leases) if self.is_pinned(key, now))
