"""What operators learn of stores and of what these hold. All of it is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

from spolia_core.errors import SpoliaError

T = TypeVar("T")

SERVED = "served"
"""State of an object that readers of its fingerprint and codec are given."""


@dataclass(frozen=True, slots=True)
class PerStore(Generic[T]):
    """What each store answered, by address. `failed` has the stores whose answer is missing, and why."""

    answers: Mapping[str, T]
    failed: Mapping[str, SpoliaError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What names an object: the same chunk of two tenants is two objects."""

    tenant_id: str
    chunk_id: bytes


@dataclass(frozen=True, slots=True)
class Pin:
    """A live pin: who holds it, and what is left of its lease in seconds."""

    owner: str
    remaining_s: float


@dataclass(frozen=True, slots=True)
class StoredReplica:
    """An object as one store holds it, on one tier or more.

    `state` is "served", "unknown_format", "unknown_codec" or "unknown_fingerprint"; `tiers` are "ram" and "disk",
    fastest first. `idle_s` counts from the last read or look-up. `compute_s` is what computing it took, 0 where nobody
    measured that.
    """

    store: str
    tiers: tuple[str, ...]
    state: str
    replica: str
    size_bytes: int
    digest: bytes
    codec: str
    format_version: int
    compute_s: float
    age_s: float
    idle_s: float
    hits: int
    pins: tuple[Pin, ...]


@dataclass(frozen=True, slots=True)
class StoredObject(ObjectName):
    """An object, with every store that holds it. `kind` is "local", "prefix" or "linked"."""

    kind: str
    num_tokens: int
    fingerprint: bytes
    replicas: tuple[StoredReplica, ...]

    @property
    def stores(self) -> tuple[str, ...]:
        """Addresses of the stores that hold it."""
        return tuple(replica.store for replica in self.replicas)

    @property
    def tiers(self) -> tuple[str, ...]:
        """Tiers that it is on anywhere, fastest first."""
        return tuple(sorted({tier for replica in self.replicas for tier in replica.tiers}, key=tier_rank))

    @property
    def state(self) -> str:
        """ "served" when one store serves it; else what the first says."""
        states = [replica.state for replica in self.replicas]
        return SERVED if SERVED in states else states[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of one copy."""
        return max(replica.size_bytes for replica in self.replicas)

    @property
    def age_s(self) -> float:
        """Seconds since it was first stored."""
        return max(replica.age_s for replica in self.replicas)

    @property
    def idle_s(self) -> float:
        """Seconds since it was last read or looked up anywhere."""
        return min(replica.idle_s for replica in self.replicas)

    @property
    def hits(self) -> int:
        """Gets that found it, over all stores."""
        return sum(replica.hits for replica in self.replicas)

    @property
    def pins(self) -> tuple[Pin, ...]:
        """Live pins on it, over all stores."""
        return tuple(pin for replica in self.replicas for pin in replica.pins)


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects of the stores that answered, and the stores that did not."""

    objects: tuple[StoredObject, ...]
    failed: Mapping[str, SpoliaError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier of a store. `read_bytes_per_s` is 0 before the first read."""

    tier: str
    num_objects: int
    used_bytes: int
    budget_bytes: int
    hits: int
    evictions: int
    read_bytes_per_s: float
    healthy: bool


@dataclass(frozen=True, slots=True)
class TenantStats:
    """What a tenant holds at a store, and may hold there; a quota of 0 is none."""

    tenant_id: str
    num_objects: int
    num_bytes: int
    quota_objects: int
    quota_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store: what is there now, and what it counted since it started. `num_objects` counts each object once.

    `backend` keeps the index, "sqlite" or "redis"; while it is not reachable, the store goes on with what it holds.
    """

    node_id: str
    num_objects: int
    tiers: tuple[TierStats, ...]
    hits: int
    misses: int
    puts: int
    evictions: int
    num_pins: int
    num_claims: int
    num_transfers: int
    digest_failures: int
    num_quarantined: int
    disk_errors: int
    backend: str
    backend_reachable: bool
    tenants: tuple[TenantStats, ...]

    @property
    def hit_rate(self) -> float | None:
        """Share of the chunks asked for by Get that were found; None before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


@dataclass(frozen=True, slots=True)
class Downloaded:
    """Where an object's bytes came from. `failed` has the stores that were tried before and gave no good copy."""

    store: str
    tier: str
    size_bytes: int
    digest: bytes
    failed: Mapping[str, SpoliaError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a store dropped. An object on two tiers counts once; `copies` counts it on each, by tier."""

    num_objects: int = 0
    num_bytes: int = 0
    copies: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Deleted) -> Deleted:
        tiers = sorted({*self.copies, *other.copies}, key=tier_rank)
        copies = {tier: self.copies.get(tier, 0) + other.copies.get(tier, 0) for tier in tiers}
        return Deleted(self.num_objects + other.num_objects, self.num_bytes + other.num_bytes, copies)


@dataclass(frozen=True, slots=True)
class DamagedCopy(ObjectName):
    """A copy that failed its check and was taken out of service."""

    tier: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verified:
    """Copies that a store checked, each tier for itself, and those that were damaged."""

    num_checked: int = 0
    bytes_checked: int = 0
    damaged: tuple[DamagedCopy, ...] = ()

    def __add__(self, other: Verified) -> Verified:
        return Verified(
            self.num_checked + other.num_checked,
            self.bytes_checked + other.bytes_checked,
            self.damaged + other.damaged,
        )


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far a store is: what it has verified so far, of how many copies."""

    store: str
    verified: Verified
    num_total: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What a store collected, or would have.

    Files that no row of its index named, rows whose file was gone, files in quarantine, and objects that were dropped
    because they are unservable or idle, as was asked.
    """

    orphan_files: int = 0
    orphan_bytes: int = 0
    lost_rows: int = 0
    quarantined_files: int = 0
    quarantined_bytes: int = 0
    dropped_objects: int = 0
    dropped_bytes: int = 0

    def __add__(self, other: Collected) -> Collected:
        return Collected(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def tier_rank(tier: str) -> tuple[int, str]:
    """Sorts tiers fastest first, those unknown to this release last."""
    known = ("ram", "disk")
    return (known.index(tier) if tier in known else len(known), tier)
