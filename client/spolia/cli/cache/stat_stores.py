"""How stores are, as tables: tiers, then the stores, then tenants."""

from __future__ import annotations

from collections.abc import Iterator

from spolia.cli.cache.objects import NO_OBJECTS
from spolia.cli.cache.stores import failures
from spolia.cli.output import plain, plain_record, print_columns, print_json, print_table
from spolia.cli.units import human_bytes
from spolia.store_results import PerStore, StoreStats, TenantStats, TierStats

TIERS = ("store", "tier", "objects", "used", "budget", "%", "hits", "evictions", "read speed", "state")
STORES = (
    "store",
    "node",
    "objects",
    "hit rate",
    "pins",
    "claims",
    "transfers",
    "digest failures",
    "quarantined",
    "disk errors",
    "backend",
    "reachable",
)
TENANTS = ("store", "tenant", "objects", "quota", "size", "byte quota")


def show(counted: PerStore[StoreStats], tenant: str, *, as_json: bool) -> None:
    """Prints what stores counted; with `tenant`, of tenants that one alone."""
    if as_json:
        stores = [_as_json(store, stats, tenant) for store, stats in counted.answers.items()]
        print_json({"stores": stores, "failed": failures(counted.failed)})
        return
    each = counted.answers.items()
    print_columns(TIERS, *(_tier(store, tier) for store, stats in each for tier in stats.tiers))
    print()
    print_columns(STORES, *(_store(store, stats) for store, stats in each))
    print()
    tenants = [_tenant(store, held) for store, stats in each for held in _tenants(stats, tenant)]
    print_table(TENANTS, tenants, empty=NO_OBJECTS)


def _as_json(store: str, stats: StoreStats, tenant: str) -> dict[str, object]:
    report = plain_record(stats)
    return {"store": store, **report, "hit_rate": stats.hit_rate, "tenants": plain(list(_tenants(stats, tenant)))}


def _tenants(stats: StoreStats, tenant: str) -> Iterator[TenantStats]:
    return (held for held in stats.tenants if tenant in ("", held.tenant_id))


def _tier(store: str, tier: TierStats) -> tuple[str, ...]:
    share = f"{100 * tier.used_bytes / tier.budget_bytes:.0f}" if tier.budget_bytes else ""
    speed = f"{human_bytes(tier.read_bytes_per_s)}/s" if tier.read_bytes_per_s else ""
    counts = (str(tier.hits), str(tier.evictions), speed, "healthy" if tier.healthy else "failing")
    sizes = (human_bytes(tier.used_bytes), human_bytes(tier.budget_bytes), share)
    return (store, tier.tier, str(tier.num_objects), *sizes, *counts)


def _store(store: str, stats: StoreStats) -> tuple[str, ...]:
    counts = (
        stats.num_pins,
        stats.num_claims,
        stats.num_transfers,
        stats.digest_failures,
        stats.num_quarantined,
        stats.disk_errors,
    )
    rate = "" if stats.hit_rate is None else f"{100 * stats.hit_rate:.0f} %"
    backend = (stats.backend, "yes" if stats.backend_reachable else "no")
    return (store, stats.node_id, str(stats.num_objects), rate, *map(str, counts), *backend)


def _tenant(store: str, held: TenantStats) -> tuple[str, ...]:
    quota_objects = str(held.quota_objects) if held.quota_objects else "no limit"
    quota_bytes = human_bytes(held.quota_bytes) if held.quota_bytes else "no limit"
    objects = (str(held.num_objects), quota_objects)
    return (store, held.tenant_id, *objects, human_bytes(held.num_bytes), quota_bytes)
