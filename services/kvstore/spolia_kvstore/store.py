"""Decides for the whole store: tiers, claims, pins, quotas and shared index move together here and in `puts.py`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import IntEnum

from spolia_core.ids import SHARED_TENANT
from spolia_core.reuse import MissReason
from spolia_kvstore.backend import Backend, ClaimAnswer
from spolia_kvstore.catalog import Catalog, Totals
from spolia_kvstore.claims import Claims
from spolia_kvstore.counters import Counters
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.entry import Elsewhere, Entry, Reader
from spolia_kvstore.kept_pins import KeptPins
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.puts import Puts
from spolia_kvstore.quotas import Tenants
from spolia_kvstore.reading import DiskReading, MemoryReading, Reading
from spolia_kvstore.shared_index import SharedIndex
from spolia_kvstore.tiers import Found, Tiers
from spolia_node.logs import get_log
from spolia_node.tracing import current_span

log = get_log(__name__)


class ClaimState(IntEnum):
    """What became of a claim. Values equal the protos' enum numbers."""

    GRANTED = 1
    """The caller computes it."""
    HELD = 2
    """Another computes it."""
    STORED = 3
    """It is here, or in a store that shares the index."""


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """One result; `owner` and `ttl_s` describe the claim that stands, if one does."""

    state: ClaimState
    owner: str = ""
    ttl_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a Delete removed: each object once in `objects`, and once on each tier in `tiers`."""

    objects: Totals
    tiers: Mapping[Tier, Totals]


class KVStore:
    """Chunk objects of all tenants. Used from one event loop; `clock` is monotonic, for leases.

    `stores` tells the live stores that share the index, this one included: node id → address.
    """

    def __init__(
        self,
        tiers: Tiers,
        catalog: Catalog,
        local: EmbeddedBackend,
        backend: Backend,
        tenants: Tenants,
        *,
        name: str,
        max_object_bytes: int,
        stores: Callable[[], Mapping[str, str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tiers = tiers
        self.catalog = catalog
        self.backend = backend
        self.tenants = tenants
        self.claims = Claims(backend, local)
        self.pins = KeptPins(catalog, clock, tiers.clock)
        self.index = SharedIndex(backend, tiers, name=name, stores=stores)
        self.counters = Counters()
        self.name = name
        self.puts = Puts(
            tiers, tenants, self.claims, self.index, self.counters, name=name, max_object_bytes=max_object_bytes
        )
        self._clock = clock
        tiers.is_pinned = self.pins.is_pinned
        tiers.listeners.added = self._on_added
        tiers.listeners.removed = self._on_removed
        for tenant_id, totals in catalog.totals_by_tenant(Tier.DISK).items():
            tenants.add(tenant_id, totals.num_bytes, totals.num_objects)
        self.pins.load(tiers.find)

    async def lookup(self, keys: Sequence[ObjectKey], reader: Reader) -> list[Entry]:
        """One entry per key. Makes what is found recently used; changes nothing else."""
        found = self._find(keys)
        self._note_uses(found)
        absent = [key for key in keys if key not in found]
        elsewhere = await self.index.locate(absent)
        missing = [key for key in absent if key not in elsewhere]
        claims = dict(zip(missing, await self.claims.holders(missing), strict=True)) if missing else {}
        stored_meanwhile = self._stored_meanwhile(absent)
        self._note_uses(stored_meanwhile)
        found |= stored_meanwhile
        entries = []
        for key in keys:
            if key in found:
                entries.append(self._judged(found[key], reader))
            elif key in elsewhere:
                entries.append(_judged_elsewhere(elsewhere[key], reader))
            else:
                claim = claims[key]
                entries.append(Entry(miss=MissReason.NOT_FOUND, claimed_by=claim.owner if claim else ""))
        return entries

    @asynccontextmanager
    async def reading(self, keys: Sequence[ObjectKey], reader: Reader) -> AsyncIterator[list[Reading]]:
        """Opens what is here for `reader`, one item per key, and closes it all at the end."""
        found = self._find(keys)
        readings: list[Reading] = []
        try:
            for key in keys:
                readings.append(self._opened(found.get(key), reader))
            absent = [key for key in keys if key not in found]
            elsewhere = await self.index.locate(absent)
            stored_meanwhile = self._stored_meanwhile(absent)
            for index, key in enumerate(keys):
                if key in stored_meanwhile:
                    readings[index] = self._opened(stored_meanwhile[key], reader)
                elif key in elsewhere:
                    entry = _judged_elsewhere(elsewhere[key], reader)
                    reason = entry.miss or MissReason.NOT_FOUND
                    readings[index].entry = Entry(miss=reason, locations=entry.locations)
            yield readings
        finally:
            for reading in readings:
                reading.close()

    async def begin(self, reading: Reading) -> Entry:
        """Begins one item of a Get; counts it as a hit or a miss."""
        entry = await reading.begin()
        if entry.record is None or entry.tier is None:
            reason = entry.miss or MissReason.NOT_FOUND
            self.counters.misses[reason] += 1
            current_span().event("cache.miss", reason=reason.name.lower())
            return entry
        self.counters.hits[entry.tier] += 1
        self.counters.read_bytes[entry.tier] += entry.record.size_bytes
        current_span().event(
            "cache.hit",
            chunk_id=entry.record.key.chunk_id.hex(),
            tier=entry.tier.name.lower(),
            num_bytes=entry.record.size_bytes,
        )
        found = self.tiers.find([entry.record.key]).get(entry.record.key)
        if found is not None:
            self.tiers.use(found, is_hit=True)
        return entry

    async def claim(self, keys: Sequence[ObjectKey], owner: str, ttl_s: float, wait_s: float) -> list[ClaimResult]:
        """Claims what is neither stored nor held by another; renews what `owner` holds.

        Waits up to `wait_s` for the first of the held keys to change, unless something new was granted: that work can
        begin at once. Raises `Unavailable` when the store goes away meanwhile.
        """
        until = self._clock() + wait_s
        standing = await self.claims.holders(keys)
        mine = {key for key, lease in zip(keys, standing, strict=True) if lease is not None and lease.owner == owner}
        with self.claims.listening(keys) as news:
            answers = await self._claim_now(keys, owner, ttl_s)
            held = _held_by_others(keys, answers, owner)
            is_news = any(_is_granted(answer, owner) and key not in mine for key, answer in answers.items())
            while held and not is_news and self._clock() < until:
                await self.claims.wait(news, [answers[key] for key in held], until - self._clock())
                news.clear()
                answers = await self._claim_now(keys, owner, ttl_s)
                is_news = _held_by_others(keys, answers, owner) != held
        return [_result_of(answers[key], owner) for key in keys]

    async def unclaim(self, keys: Sequence[ObjectKey], owner: str) -> int:
        """Gives claims back; others' are left alone. Returns how many ended."""
        return await self.claims.release(keys, owner)

    def pin(self, keys: Sequence[ObjectKey], owner: str, lease_s: float) -> list[bool]:
        """Pins what is here, or renews the pin; false for what is not here."""
        found = self.tiers.find(keys)
        self._note_uses(found)
        self.pins.pin(found, owner, lease_s)
        return [key in found for key in keys]

    def unpin(self, keys: Sequence[ObjectKey], owner: str) -> int:
        """Ends the owner's pins. Returns how many ended."""
        return self.pins.unpin(keys, owner)

    async def release_node(self, node_id: str) -> None:
        """Ends the claims and pins of a node that left the cluster, so that nobody waits for what it will not do.

        A node that is alive after all loses little: what it stores is taken all the same.
        """
        num_pins = self.pins.end_of_node(node_id)
        num_claims = await self.claims.end_of_node(node_id)
        if num_claims or num_pins:
            log.info("released what a node left behind", node=node_id, num_claims=num_claims, num_pins=num_pins)

    async def delete(self, keys: Sequence[ObjectKey]) -> Dropped:
        """Drops objects, pinned or not, from every tier of this store. Readers that have begun finish."""
        await self.index.bury(keys)  # first: what is stored from now on, is stored after it
        objects, tiers = Totals(), {tier: Totals() for tier in Tier}
        for record, on in await self.tiers.delete(list(dict.fromkeys(keys))):
            objects = _plus(objects, record)
            for tier in on:
                tiers[tier] = _plus(tiers[tier], record)
        return Dropped(objects, tiers)

    async def sweep(self) -> None:
        """Writes down uses and forgets leases that ran out. Called now and then."""
        self.pins.sweep()
        if self.tiers.disk is not None:
            await self.tiers.disk.tidy()

    def note_damage(self) -> None:
        """Counts bytes that did not match their digest."""
        self.counters.digest_failures += 1

    @property
    def num_objects(self) -> int:
        """Objects here, each counted once."""
        return sum(held.num_objects for held in self.tenants.held().values())

    async def close(self) -> None:
        """Waits for what is under way."""
        await self.index.close()
        await self.tiers.close()

    def check_invariants(self) -> None:
        """Asserts that tiers, index and counts agree. For tests, while nothing is being written."""
        self.tiers.check_invariants()
        held: dict[str, Totals] = {}
        records = {stored.record.key: stored.record for stored in self.tiers.ram}
        if self.tiers.disk is not None:
            records |= {row.record.key: row.record for row in self.tiers.disk.rows.walk()}
        for key, record in records.items():
            held[key.tenant_id] = _plus(held.get(key.tenant_id, Totals()), record)
        assert held == self.tenants.held(), (held, self.tenants.held())

    def _find(self, keys: Sequence[ObjectKey]) -> dict[ObjectKey, Found]:
        """What is here for the tenant of these keys: its own, else what all tenants share."""
        found = self.tiers.find(keys)
        shared = {
            ObjectKey(SHARED_TENANT, key.chunk_id): key
            for key in keys
            if key not in found and key.tenant_id != SHARED_TENANT
        }
        if shared and SHARED_TENANT in self.tenants.held():
            found |= {shared[key]: item for key, item in self.tiers.find(list(shared)).items()}
        return found

    def _stored_meanwhile(self, absent: Sequence[ObjectKey]) -> dict[ObjectKey, Found]:
        """What is here of keys that were not before the shared index was asked: others had their turn meanwhile."""
        return self._find(absent) if self.index.is_shared else {}

    def _note_uses(self, found: Mapping[ObjectKey, Found]) -> None:
        for item in found.values():
            self.tiers.use(item, is_hit=False)

    def _can_be_read(self, found: Found) -> bool:
        """Whether a reader of any codec would take it from here."""
        return Reader().misses(found.record, found.tier, self.tiers.gate) is None

    def _judged(self, found: Found, reader: Reader) -> Entry:
        miss = reader.misses(found.record, found.tier, self.tiers.gate)
        if miss is not None:
            return Entry(miss=miss)
        return Entry(found.record, found.tier, locations=self.index.here(found.tier))

    def _opened(self, found: Found | None, reader: Reader) -> Reading:
        if found is None:
            return Reading(Entry(miss=MissReason.NOT_FOUND))
        entry = self._judged(found, reader)
        if entry.miss is not None:
            return Reading(entry)
        if found.stored is not None:
            return MemoryReading(entry, self.tiers, found.stored, self.note_damage)
        assert found.row is not None
        return DiskReading(entry, self.tiers, found.row, self.note_damage)

    async def _claim_now(self, keys: Sequence[ObjectKey], owner: str, ttl_s: float) -> dict[ObjectKey, ClaimAnswer]:
        """Objects that are here but skipped for their tier's slowness can be claimed like missing ones."""
        found = self._find(keys)
        answers: dict[ObjectKey, ClaimAnswer] = {}
        absent, skipped = [], []
        for key in dict.fromkeys(keys):
            if key not in found:
                absent.append(key)
            elif self._can_be_read(found[key]):
                answers[key] = ClaimAnswer(is_stored=True)
            else:
                skipped.append(key)
        shared = await self.index.locate_shared(absent)
        answers |= dict.fromkeys(shared, ClaimAnswer(is_stored=True))
        absent = [key for key in absent if key not in shared]
        for group, live in ((absent, self.index.others()), (skipped, [])):
            if group:
                answers |= zip(group, await self.claims.take(group, owner, ttl_s, live), strict=True)
        stored = [key for key, item in self._stored_meanwhile(absent).items() if self._can_be_read(item)]
        needless = [key for key in stored if _is_granted(answers[key], owner)]
        if needless:
            await self.claims.release(needless, owner)
        return answers | dict.fromkeys(stored, ClaimAnswer(is_stored=True))

    def _on_added(self, record: ObjectRecord, tier: Tier, is_new: bool) -> None:
        self.index.unburied.discard(record.key)
        if is_new:
            self.tenants.add(record.key.tenant_id, record.size_bytes)
        if not (tier is Tier.RAM and is_new):  # a Put announces its object itself
            self.index.say(record.key, tier)

    def _on_removed(self, record: ObjectRecord, tier: Tier, is_gone: bool) -> None:
        if is_gone:
            self.tenants.add(record.key.tenant_id, -record.size_bytes, -1)
            self.pins.drop(record.key)
        self.index.unsay(record.key, tier)


def _judged_elsewhere(found: Elsewhere, reader: Reader) -> Entry:
    miss = reader.refuses(found.record)
    if miss is not None:
        return Entry(miss=miss)
    return Entry(found.record, found.locations[0].tier, locations=found.locations)


def _is_granted(answer: ClaimAnswer, owner: str) -> bool:
    return answer.lease is not None and answer.lease.owner == owner


def _held_by_others(keys: Sequence[ObjectKey], answers: Mapping[ObjectKey, ClaimAnswer], owner: str) -> set[ObjectKey]:
    return {key for key in keys if answers[key].lease is not None and not _is_granted(answers[key], owner)}


def _result_of(answer: ClaimAnswer, owner: str) -> ClaimResult:
    if answer.lease is None:
        return ClaimResult(ClaimState.STORED)
    state = ClaimState.GRANTED if answer.lease.owner == owner else ClaimState.HELD
    return ClaimResult(state, answer.lease.owner, answer.lease.remaining_s)


def _plus(totals: Totals, record: ObjectRecord) -> Totals:
    return Totals(totals.num_objects + 1, totals.num_bytes + record.size_bytes)
