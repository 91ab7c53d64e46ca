"""What readers can use, and what is known of a chunk for one of them."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_core.ids import FORMAT_VERSION
from spolia_core.reuse import MissReason
from spolia_kvstore.cost_gate import CostGate
from spolia_kvstore.objects import ObjectRecord, Tier
from spolia_kvstore.verify import KNOWN_CODECS


@dataclass(frozen=True, slots=True)
class Reader:
    """What a reader can use. Empty codecs or fingerprint mean any. `ignore_cost`: also what is slow to read."""

    accepted_codecs: frozenset[str] = frozenset()
    fingerprint: bytes = b""
    ignore_cost: bool = False

    def refuses(self, record: ObjectRecord) -> MissReason | None:
        """Why this object is of no use to the reader; None when it is. What this release cannot check is not served."""
        if record.format_version != FORMAT_VERSION:
            return MissReason.FORMAT_VERSION
        if record.codec not in KNOWN_CODECS:
            return MissReason.CODEC
        if self.fingerprint and self.fingerprint != record.fingerprint:
            return MissReason.FINGERPRINT
        if self.accepted_codecs and record.codec not in self.accepted_codecs:
            return MissReason.CODEC
        return None

    def misses(self, record: ObjectRecord, tier: Tier, gate: CostGate) -> MissReason | None:
        """Why an object that is here is a miss for this reader, its tier's slowness included; None when it is a hit."""
        miss = self.refuses(record)
        if miss is None and not self.ignore_cost and gate.skips(record, tier):
            return MissReason.SLOWER_THAN_COMPUTING
        return miss


@dataclass(frozen=True, slots=True)
class Location:
    """A live store that holds an object, and its fastest tier there."""

    store_id: str
    address: str
    tier: Tier


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """An object of other live stores: the record of its fastest replica, and where it is."""

    record: ObjectRecord
    locations: tuple[Location, ...]
    is_on_disk: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one chunk: its record and tier, or why it is missed and who computes it now.

    `locations` are the stores that have it, where several share an index; `record` is that of the first.
    """

    record: ObjectRecord | None = None
    tier: Tier | None = None
    miss: MissReason | None = None
    claimed_by: str = ""
    locations: tuple[Location, ...] = ()
