"""Pins that outlive the process: in memory they decide, in the catalog they are kept. See `pins.py`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence

from spolia_kvstore.catalog import Catalog
from spolia_kvstore.catalog_leases import Lease
from spolia_kvstore.limits import MAX_LEFT_S
from spolia_kvstore.objects import ObjectKey
from spolia_kvstore.pins import Pins
from spolia_node.logs import get_log

log = get_log(__name__)


class KeptPins:
    """`clock` is monotonic and decides; `wall_clock` dates what is kept."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self._pins = Pins()
        self._kept = catalog.pins
        self._clock = clock
        self._wall_clock = wall_clock

    @property
    def num_live(self) -> int:
        """Live pins, counted per owner."""
        return self._pins.num_live(self._clock())

    def load(self, which_are_here: Callable[[Sequence[ObjectKey]], Collection[ObjectKey]]) -> None:
        """Takes up what is left of the pins of the last process, on objects that are still here."""
        now, wall = self._clock(), self._wall_clock()
        leases = self._kept.standing(wall)
        here = which_are_here([lease.key for lease in leases])
        for lease in leases:
            if lease.key in here:
                self._pins.pin(lease.key, lease.owner, now + min(MAX_LEFT_S, lease.until - wall))
        self._forget([(lease.key, lease.owner) for lease in leases if lease.key not in here])

    def is_pinned(self, key: ObjectKey) -> bool:
        """Whether any lease lives."""
        return self._pins.is_pinned(key, self._clock())

    def of(self, key: ObjectKey) -> list[tuple[str, float]]:
        """Owners that pin it, with what is left of each lease in seconds."""
        return self._pins.of(key, self._clock())

    def pin(self, keys: Collection[ObjectKey], owner: str, lease_s: float) -> None:
        """Pins, or renews the owner's pins."""
        for key in keys:
            self._pins.pin(key, owner, self._clock() + lease_s)
        until = self._wall_clock() + lease_s
        self._keep(lambda: self._kept.put([Lease(key, owner, until) for key in keys]))

    def unpin(self, keys: Sequence[ObjectKey], owner: str) -> int:
        """Ends the owner's pins. Returns how many ended."""
        now = self._clock()
        num_ended = sum(self._pins.unpin(key, owner, now) for key in dict.fromkeys(keys))
        self._forget([(key, owner) for key in keys])
        return num_ended

    def drop(self, key: ObjectKey) -> None:
        """Ends every pin of an object that is gone."""
        self._forget([(key, owner) for owner in self._pins.drop(key)])

    def end_of_node(self, node_id: str) -> int:
        """Ends the pins of a node that is gone. Returns how many ended."""
        ended = self._pins.end_of_node(node_id)
        self._forget(ended)
        return len(ended)

    def sweep(self) -> None:
        """Forgets leases that have run out."""
        self._forget(self._pins.sweep(self._clock()))

    def _forget(self, pins: Collection[tuple[ObjectKey, str]]) -> None:
        if pins:
            self._keep(lambda: self._kept.remove(pins))

    def _keep(self, write: Callable[[], None]) -> None:
        """What cannot be written costs a pin after a crash, no more."""
        try:
            write()
        except sqlite3.Error as error:
            log.warning("not written to the index", what="pins", error=str(error))
