"""What a store counts, as a message."""

from __future__ import annotations

from spolia.v1 import kvstore_pb2
from spolia_kvstore.objects import Tier
from spolia_kvstore.store import KVStore
from spolia_kvstore.wire import tier_message


def stats_message(store: KVStore) -> kvstore_pb2.GetStatsResponse:
    """Counts since the start, and what is here now."""
    tiers, counters = store.tiers, store.counters
    disk = tiers.disk
    return kvstore_pb2.GetStatsResponse(
        num_objects=store.num_objects,
        used_bytes=tiers.ram.resident_bytes,
        budget_bytes=tiers.ram.budget_bytes,
        num_pins=store.pins.num_live,
        num_claims=store.claims.num_live(),
        num_transfers=tiers.num_transfers,
        hits=counters.hits.total(),
        misses=counters.misses.total(),
        evictions=tiers.counters.evictions + (disk.counters.evictions if disk is not None else 0),
        digest_failures=counters.digest_failures,
        puts=counters.puts,
        tiers=tiers_message(store),
        tenants=_tenants(store),
        num_quarantined=disk.counters.quarantined if disk is not None else 0,
        disk_errors=disk.num_errors if disk is not None else 0,
        backend=store.backend.name,
        backend_reachable=store.backend.reachable,
        node_id=store.name,
    )


def tiers_message(store: KVStore) -> list[kvstore_pb2.TierStats]:
    """Each tier there is."""
    tiers, gate = store.tiers, store.tiers.gate
    ram = kvstore_pb2.TierStats(
        tier=tier_message(Tier.RAM),
        num_objects=len(tiers.ram),
        used_bytes=tiers.ram.resident_bytes,
        budget_bytes=tiers.ram.budget_bytes,
        evictions=tiers.counters.evictions,
        read_bytes_per_s=gate.speeds[Tier.RAM].bytes_per_s,
        healthy=True,
        hits=store.counters.hits[Tier.RAM],
    )
    if tiers.disk is None:
        return [ram]
    disk = kvstore_pb2.TierStats(
        tier=tier_message(Tier.DISK),
        num_objects=len(tiers.disk),
        used_bytes=tiers.disk.used_bytes,
        budget_bytes=tiers.disk.budget_bytes,
        evictions=tiers.disk.counters.evictions,
        read_bytes_per_s=gate.speeds[Tier.DISK].bytes_per_s,
        healthy=tiers.disk.healthy,
        hits=store.counters.hits[Tier.DISK],
    )
    return [ram, disk]


def _tenants(store: KVStore) -> list[kvstore_pb2.TenantStats]:
    return [
        kvstore_pb2.TenantStats(
            tenant_id=tenant_id,
            num_objects=held.num_objects,
            num_bytes=held.num_bytes,
            quota_objects=store.tenants.quota(tenant_id).num_objects,
            quota_bytes=store.tenants.quota(tenant_id).num_bytes,
        )
        for tenant_id, held in sorted(store.tenants.held().items())
    ]
