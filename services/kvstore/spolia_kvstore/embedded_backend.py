"""The backend of a store that is alone: its own catalog, and what it remembers.

Claims and members live in memory and are written to the catalog as they change, so that they outlive the process: after
a crash nobody computes what another still computes. Where the disk refuses, memory goes on alone.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from spolia_kvstore.backend import ClaimAnswer, ClaimLease, MemberLease, Replica
from spolia_kvstore.backend_news import BackendNews
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.catalog_leases import Lease
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.limits import MAX_LEFT_S
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.usage import Usage
from spolia_node.logs import get_log

SWEEP_EVERY_S = 1.0

log = get_log(__name__)


class EmbeddedBackend(BackendNews):
    """`Backend` for one store. Leases run by `clock`, which is monotonic; `wall_clock` dates what outlives the process.

    Replicas are the rows of the catalog. With no `live_stores` none of them counts. News is told at once.
    """

    name = "sqlite"
    is_shared = False

    def __init__(
        self,
        catalog: Catalog,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.catalog = catalog
        self._clock = clock
        self._wall_clock = wall_clock
        self._claims = {
            lease.key: lease._replace(until=self._from_wall(lease.until))
            for lease in catalog.claims.standing(wall_clock())
        }
        self._members = {
            node_id: (session, record, self._from_wall(until))
            for node_id, session, record, until in catalog.members.all()
        }
        self._next_sweep = 0.0
        self._last_session = 0

    @property
    def reachable(self) -> bool:
        """Always."""
        return True

    async def start(self) -> None:
        """Nothing to connect to."""
        self.tell_reconnected()

    async def close(self) -> None:
        """The catalog is its owner's to close."""

    async def publish(self, replicas: Sequence[Replica]) -> None:
        """Lists replicas that the catalog has not, and ends the claims on all."""
        now = self._wall_clock()
        rows = [Row(each.record, each.tier, Usage(now, now)) for each in replicas]
        self.catalog.put_many(rows)
        await self.unclaim([each.record.key for each in replicas], None)

    async def publish_again(self, replicas: Sequence[Replica]) -> list[ObjectKey]:
        """The same: nothing can be buried."""
        await self.publish(replicas)
        return []

    async def bury(self, keys: Sequence[ObjectKey]) -> None:
        """No other store could be away."""

    async def withdraw(self, store_id: str, keys: Sequence[ObjectKey], tier: Tier) -> None:
        """Forgets rows."""
        self.catalog.remove(keys, tier)

    async def locate(
        self, tenant_id: str, chunk_ids: Sequence[bytes], live_stores: Collection[str]
    ) -> dict[bytes, list[Replica]]:
        """Rows as replicas of the one store there is."""
        if not live_stores:
            return {}
        store_id = next(iter(live_stores))
        found = self.catalog.lookup_all(tenant_id, chunk_ids)
        return {chunk_id: [Replica(row.record, row.tier, store_id) for row in rows] for chunk_id, rows in found.items()}

    async def claim(
        self, keys: Sequence[ObjectKey], owner: str, ttl_s: float, live_stores: Collection[str]
    ) -> list[ClaimAnswer]:
        """One transaction for all that are granted."""
        now = self._clock()
        self._sweep(now)
        stored = self._stored(keys) if live_stores else set()
        answers, granted = [], []
        for key in keys:
            if key in stored:
                answers.append(ClaimAnswer(is_stored=True))
                continue
            standing = self._standing(key, now)
            if standing is None or standing.owner == owner:
                standing = self._claims[key] = Lease(key, owner, now + ttl_s)
                granted.append(standing)
            answers.append(ClaimAnswer(lease=ClaimLease(standing.owner, standing.until - now)))
        with self._persisting("claims", granted):
            self.catalog.claims.put([each._replace(until=self._to_wall(each.until)) for each in granted])
        return answers

    async def unclaim(self, keys: Sequence[ObjectKey], owner: str | None) -> list[bool]:
        """Ends claims and tells of them."""
        now = self._clock()
        standing = [self._standing(key, now) for key in keys]
        ended = {lease.key: lease for lease in standing if lease is not None and owner in (None, lease.owner)}
        for key in ended:
            del self._claims[key]
        with self._persisting("claims", ended):
            self.catalog.claims.remove([(lease.key, lease.owner) for lease in ended.values()])
        self.tell_claims_ended(list(ended))
        return [key in ended for key in keys]

    async def unclaim_silently(self, keys: Sequence[ObjectKey]) -> None:
        """Forgets claims on which another backend decides now; nobody is told, since nothing ended."""
        known = [lease for key in keys if (lease := self._claims.pop(key, None)) is not None]
        with self._persisting("claims", known):
            self.catalog.claims.remove([(lease.key, lease.owner) for lease in known])

    def claim_owners(self) -> list[tuple[ObjectKey, str]]:
        """Every claim that stands, and its owner."""
        now = self._clock()
        return [(lease.key, lease.owner) for lease in list(self._claims.values()) if lease.until > now]

    async def claims(self, keys: Sequence[ObjectKey]) -> list[ClaimLease | None]:
        """What stands in memory."""
        now = self._clock()
        standing = [self._standing(key, now) for key in keys]
        return [None if lease is None else ClaimLease(lease.owner, lease.until - now) for lease in standing]

    async def next_session(self) -> int:
        """Counted in the catalog, so that a new process does not begin anew."""
        self._last_session += 1
        with self._persisting("sessions", [self._last_session]):
            self._last_session = max(self._last_session, self.catalog.next_number("session"))
        return self._last_session

    async def renew_member(self, node_id: str, session: int, record: bytes, lease_s: float) -> bool:
        """The record is written only when it changed, the lease at every renewal."""
        known = self._members.get(node_id)
        if known is not None and known[0] > session:
            return False
        until = self._clock() + lease_s
        self._members[node_id] = (session, record, until)
        with self._persisting("members", [node_id]):
            if known is None or known[:2] != (session, record):
                self.catalog.members.put(node_id, session, record)
            self.catalog.members.renew(node_id, self._to_wall(until))
        if known is None or known[1] != record:
            self.tell_members_changed()
        return True

    async def drop_member(self, node_id: str, session: int) -> bool:
        """Removes it when the session is its own."""
        known = self._members.get(node_id)
        if known is None or known[0] != session:
            return False
        self._forget_members([node_id])
        return True

    async def members(self) -> list[MemberLease]:
        """Those whose lease has not run out; the others are forgotten."""
        now = self._clock()
        self._forget_members([node_id for node_id, known in self._members.items() if known[2] <= now])
        return [
            MemberLease(node_id, session, record, until - now)
            for node_id, (session, record, until) in sorted(self._members.items())
        ]

    def _to_wall(self, until: float) -> float:
        return self._wall_clock() + until - self._clock()

    def _from_wall(self, until: float) -> float:
        return self._clock() + min(MAX_LEFT_S, until - self._wall_clock())

    def _standing(self, key: ObjectKey, now: float) -> Lease | None:
        lease = self._claims.get(key)
        return lease if lease is not None and lease.until > now else None

    def _stored(self, keys: Sequence[ObjectKey]) -> set[ObjectKey]:
        by_tenant: dict[str, list[bytes]] = {}
        for key in keys:
            by_tenant.setdefault(key.tenant_id, []).append(key.chunk_id)
        return {
            ObjectKey(tenant_id, chunk_id)
            for tenant_id, ids in by_tenant.items()
            for chunk_id in self.catalog.lookup(tenant_id, ids)
        }

    def _sweep(self, now: float) -> None:
        """Forgets lapsed claims now and then, so that those nobody asks about again do not pile up."""
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_EVERY_S
            lapsed = [lease for lease in self._claims.values() if lease.until <= now]
            for lease in lapsed:
                del self._claims[lease.key]
            with self._persisting("claims", lapsed):
                self.catalog.claims.remove([(lease.key, lease.owner) for lease in lapsed])

    def _forget_members(self, node_ids: Sequence[str]) -> None:
        for node_id in node_ids:
            del self._members[node_id]
            with self._persisting("members", [node_id]):
                self.catalog.members.remove(node_id)
        if node_ids:
            self.tell_members_changed()

    @contextmanager
    def _persisting(self, what: str, items: Collection[object]) -> Iterator[None]:
        """What cannot be written costs single flight or a stale member after a crash, no more."""
        try:
            yield
        except sqlite3.Error as error:
            log.warning("not written to the index", what=what, num_items=len(items), error=str(error))
