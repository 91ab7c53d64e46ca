"""Between messages and the store's values: what a request must be, and how answers are said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spolia.v1 import common_pb2, kvstore_pb2
from spolia_core.digests import DIGEST_BYTES
from spolia_core.errors import NotSupported
from spolia_core.field_checks import check_field
from spolia_core.ids import ID_BYTES
from spolia_core.reuse import ChunkKind
from spolia_kvstore.catalog import Totals
from spolia_kvstore.entry import Entry, Reader
from spolia_kvstore.housekeeping import Collected, Listed, Verified
from spolia_kvstore.object_info import info_of, record_of_info
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.store import ClaimResult, Dropped

MAX_IDS = 4096
MAX_NAME_BYTES = 256


def keys_of(tenant_id: str, chunk_ids: Sequence[bytes]) -> list[ObjectKey]:
    """Raises `InvalidRequest` for a bad tenant, too many ids, or an id that is none."""
    check_name(tenant_id, "tenant_id")
    check_field(len(chunk_ids) <= MAX_IDS, "chunk_ids", f"at most {MAX_IDS} ids", len(chunk_ids))
    for index, chunk_id in enumerate(chunk_ids):
        check_field(len(chunk_id) == ID_BYTES, f"chunk_ids[{index}]", f"{ID_BYTES} bytes", f"{len(chunk_id)} bytes")
    return [ObjectKey(tenant_id, chunk_id) for chunk_id in chunk_ids]


def reader_of(request: kvstore_pb2.LookupRequest | kvstore_pb2.GetRequest) -> Reader:
    """What the caller can use. Raises `InvalidRequest` for a fingerprint of wrong length."""
    size = len(request.fingerprint)
    check_field(size in (0, ID_BYTES), "fingerprint", f"{ID_BYTES} bytes or none", f"{size} bytes")
    return Reader(frozenset(request.accepted_codecs), request.fingerprint, request.ignore_cost)


def record_of(header: kvstore_pb2.PutHeader) -> ObjectRecord:
    """The announced object. Raises `InvalidRequest` for what no store could keep."""
    info = header.info
    check_name(header.tenant_id, "tenant_id")
    for field, value, size in (
        ("chunk_id", info.chunk_id, ID_BYTES),
        ("fingerprint", info.fingerprint, ID_BYTES),
        ("digest", info.digest, DIGEST_BYTES),
    ):
        check_field(len(value) == size, f"info.{field}", f"{size} bytes", f"{len(value)} bytes")
    kinds = [kind.value for kind in ChunkKind]
    check_field(info.kind in kinds, "info.kind", f"one of {kinds}", info.kind)
    return replace(record_of_info(ObjectKey(header.tenant_id, info.chunk_id), info), replica="")


def is_durable(header: kvstore_pb2.PutHeader) -> bool:
    """Whether the object must be on disk. Raises `NotSupported` for a durability that this release does not know."""
    names = kvstore_pb2.Durability
    if header.durability not in names.values():
        raise NotSupported("unknown durability", field="durability", actual=str(header.durability))
    return header.durability == names.DURABILITY_DISK


def lease_s(field: str, given_ms: int, default_ms: int, max_ms: int) -> float:
    """A lease in seconds; 0 ms means the default. Raises `InvalidRequest` when it is longer than allowed."""
    check_field(given_ms <= max_ms, field, f"at most {max_ms} ms", given_ms)
    return (given_ms or default_ms) / 1000


def check_name(name: str, field: str) -> None:
    """Raises `InvalidRequest` unless `name` (a tenant, an owner) has 1 … 256 bytes."""
    size = len(name.encode())
    check_field(1 <= size <= MAX_NAME_BYTES, field, f"1 … {MAX_NAME_BYTES} bytes", f"{size} bytes")


def entry_message(entry: Entry) -> kvstore_pb2.LookupEntry:
    """What is known of one chunk. `info` is set exactly when the reader can have it."""
    return kvstore_pb2.LookupEntry(
        info=None if entry.record is None else info_of(entry.record),
        tier=common_pb2.Tier.ValueType(entry.tier or 0),
        miss=common_pb2.MissReason.ValueType(entry.miss or 0),
        claimed_by=entry.claimed_by,
        locations=[
            kvstore_pb2.StoreLocation(node_id=place.store_id, address=place.address, tier=tier_message(place.tier))
            for place in entry.locations
        ],
    )


def claim_message(result: ClaimResult) -> kvstore_pb2.ClaimResult:
    """What became of a claim."""
    return kvstore_pb2.ClaimResult(
        state=kvstore_pb2.ClaimState.ValueType(result.state),
        owner=result.owner,
        ttl_ms=max(0, round(result.ttl_s * 1000)),
    )


def tier_message(tier: Tier) -> common_pb2.Tier.ValueType:
    """A tier's number on the wire."""
    return common_pb2.Tier.ValueType(tier)


def dropped_message(dropped: Dropped) -> kvstore_pb2.DeleteResponse:
    """What a Delete removed."""
    return kvstore_pb2.DeleteResponse(
        num_deleted=dropped.objects.num_objects,
        bytes_deleted=dropped.objects.num_bytes,
        tiers=[tier_count(tier, totals) for tier, totals in sorted(dropped.tiers.items()) if totals.num_objects],
    )


def tier_count(tier: Tier, totals: Totals) -> kvstore_pb2.TierCount:
    """Copies on a tier."""
    return kvstore_pb2.TierCount(tier=tier_message(tier), num_objects=totals.num_objects, num_bytes=totals.num_bytes)


def listed_message(listed: Listed) -> kvstore_pb2.ListedObject:
    """An object as operators see it."""
    return kvstore_pb2.ListedObject(
        tenant_id=listed.record.key.tenant_id,
        info=info_of(listed.record),
        tiers=[tier_message(tier) for tier in listed.tiers],
        state=kvstore_pb2.ObjectState.ValueType(listed.state),
        age_s=listed.age_s,
        idle_s=listed.idle_s,
        hits=listed.hits,
        pins=[
            kvstore_pb2.PinLease(owner=owner, remaining_ms=max(0, round(left * 1000))) for owner, left in listed.pins
        ],
    )


def verified_message(verified: Verified, *, done: bool) -> kvstore_pb2.VerifyResponse:
    """Progress of a check."""
    return kvstore_pb2.VerifyResponse(
        num_checked=verified.num_checked,
        bytes_checked=verified.bytes_checked,
        num_total=verified.num_total,
        done=done,
        damaged=[
            kvstore_pb2.DamagedCopy(
                tenant_id=damage.key.tenant_id,
                chunk_id=damage.key.chunk_id,
                tier=tier_message(damage.tier),
                reason=damage.reason,
            )
            for damage in verified.damaged
        ],
    )


def collected_message(collected: Collected) -> kvstore_pb2.CollectResponse:
    """What a collection found."""
    return kvstore_pb2.CollectResponse(
        orphan_files=collected.orphans.num_objects,
        orphan_bytes=collected.orphans.num_bytes,
        lost_rows=collected.lost_rows,
        quarantined_files=collected.quarantined.num_objects,
        quarantined_bytes=collected.quarantined.num_bytes,
        dropped_objects=collected.dropped.num_objects,
        dropped_bytes=collected.dropped.num_bytes,
    )
