"""Turns what stores send into values, and what several say of one object into one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from spolia.enum_names import enum_name
from spolia.store_results import (
    Collected,
    DamagedCopy,
    Deleted,
    Pin,
    StoredObject,
    StoredReplica,
    StoreStats,
    TenantStats,
    TierStats,
    Verified,
)
from spolia.v1 import common_pb2, kvstore_pb2
from spolia_core.errors import InternalError


def tier_name(tier: int) -> str:
    """ "ram" or "disk"."""
    return enum_name(common_pb2.Tier.DESCRIPTOR, tier)


def tier_of(tier: kvstore_pb2.TierStats) -> TierStats:
    """A tier of a store."""
    return TierStats(
        tier=tier_name(tier.tier),
        num_objects=tier.num_objects,
        used_bytes=tier.used_bytes,
        budget_bytes=tier.budget_bytes,
        hits=tier.hits,
        evictions=tier.evictions,
        read_bytes_per_s=tier.read_bytes_per_s,
        healthy=tier.healthy,
    )


def merged(listed: Mapping[str, Iterable[kvstore_pb2.ListedObject]]) -> list[StoredObject]:
    """What stores (by address) list as one object each, by tenant and id. Replicas follow the order of the stores."""
    replicas: dict[tuple[str, bytes], list[StoredReplica]] = {}
    infos: dict[tuple[str, bytes], common_pb2.ObjectInfo] = {}
    for store, objects in listed.items():
        for found in objects:
            key = (found.tenant_id, found.info.chunk_id)
            infos.setdefault(key, found.info)
            replicas.setdefault(key, []).append(_replica(store, found))
    return [
        StoredObject(
            tenant_id=tenant_id,
            chunk_id=chunk_id,
            kind=enum_name(common_pb2.ChunkKind.DESCRIPTOR, info.kind),
            num_tokens=info.num_tokens,
            fingerprint=info.fingerprint,
            replicas=tuple(replicas[tenant_id, chunk_id]),
        )
        for (tenant_id, chunk_id), info in sorted(infos.items(), key=lambda item: item[0])
    ]


def stats_of(response: kvstore_pb2.GetStatsResponse) -> StoreStats:
    """A store's counts."""
    return StoreStats(
        node_id=response.node_id,
        num_objects=response.num_objects,
        tiers=tuple(map(tier_of, response.tiers)),
        hits=response.hits,
        misses=response.misses,
        puts=response.puts,
        evictions=response.evictions,
        num_pins=response.num_pins,
        num_claims=response.num_claims,
        num_transfers=response.num_transfers,
        digest_failures=response.digest_failures,
        num_quarantined=response.num_quarantined,
        disk_errors=response.disk_errors,
        backend=response.backend,
        backend_reachable=response.backend_reachable,
        tenants=tuple(
            TenantStats(t.tenant_id, t.num_objects, t.num_bytes, t.quota_objects, t.quota_bytes)
            for t in response.tenants
        ),
    )


def deleted_of(response: kvstore_pb2.DeleteResponse) -> Deleted:
    """What one Delete dropped."""
    copies = {tier_name(count.tier): count.num_objects for count in response.tiers}
    return Deleted(response.num_deleted, response.bytes_deleted, copies)


def verified_of(responses: Iterable[kvstore_pb2.VerifyResponse]) -> Iterator[tuple[Verified, int]]:
    """What was verified after each message of one Verify, and how many copies there are to check.

    A damaged copy is counted once, in however many messages it is named. Raises `InternalError` for a stream that ends
    too soon.
    """
    damaged: dict[DamagedCopy, None] = {}
    done = False
    for response in responses:
        damaged.update(dict.fromkeys(map(_damaged_copy, response.damaged)))
        done = response.done
        yield Verified(response.num_checked, response.bytes_checked, tuple(damaged)), response.num_total
    if not done:
        raise InternalError("the stream ended before everything was verified")


def collected_of(response: kvstore_pb2.CollectResponse) -> Collected:
    """What one Collect did."""
    return Collected(
        orphan_files=response.orphan_files,
        orphan_bytes=response.orphan_bytes,
        lost_rows=response.lost_rows,
        quarantined_files=response.quarantined_files,
        quarantined_bytes=response.quarantined_bytes,
        dropped_objects=response.dropped_objects,
        dropped_bytes=response.dropped_bytes,
    )


def miss_name(reason: int) -> str:
    """Why an object was not given, in lower case."""
    return enum_name(common_pb2.MissReason.DESCRIPTOR, reason)


def _damaged_copy(copy: kvstore_pb2.DamagedCopy) -> DamagedCopy:
    return DamagedCopy(copy.tenant_id, copy.chunk_id, tier_name(copy.tier), copy.reason)


def _replica(store: str, found: kvstore_pb2.ListedObject) -> StoredReplica:
    info = found.info
    return StoredReplica(
        store=store,
        tiers=tuple(map(tier_name, found.tiers)),
        state=enum_name(kvstore_pb2.ObjectState.DESCRIPTOR, found.state),
        replica=info.replica,
        size_bytes=info.size_bytes,
        digest=info.digest,
        codec=info.codec,
        format_version=info.format_version,
        compute_s=info.compute_s,
        age_s=found.age_s,
        idle_s=found.idle_s,
        hits=found.hits,
        pins=tuple(Pin(pin.owner, pin.remaining_ms / 1000) for pin in found.pins),
    )
