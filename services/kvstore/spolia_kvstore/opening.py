"""Puts a store together from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from spolia_kvstore.backend import Backend
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.cost_gate import CostGate
from spolia_kvstore.disk_files import DiskFiles
from spolia_kvstore.disk_tier import DiskTier
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.quotas import Quota, Tenants, read_quotas
from spolia_kvstore.ram_tier import RamTier
from spolia_kvstore.recovery import open_folder
from spolia_kvstore.redis_backend import RedisBackend
from spolia_kvstore.store import KVStore
from spolia_kvstore.tiers import Tiers


def open_store(
    config: KVStoreConfig,
    stores: Callable[[], Mapping[str, str]],
    *,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> KVStore:
    """The store that the settings ask for, its folder opened and repaired.

    Raises `InvalidRequest` for a folder, an index, a quotas file or a Redis address that cannot be used.
    """
    quotas = read_quotas(config.quotas_file) if config.quotas_file is not None else {}
    tenants = Tenants(Quota(config.tenant_quota_bytes, config.tenant_quota_objects), quotas)
    shared = RedisBackend(config.redis_url, config.redis_prefix) if config.redis_url else None
    files, catalog = _open_data(config)
    tiers = make_tiers(config, files, catalog, wall_clock)
    local = EmbeddedBackend(catalog, clock, wall_clock)
    backend: Backend = local if shared is None else shared
    return KVStore(
        tiers,
        catalog,
        local,
        backend,
        tenants,
        name=config.node_id,
        max_object_bytes=config.max_object_bytes,
        stores=stores,
        clock=clock,
    )


def make_tiers(
    config: KVStoreConfig, files: DiskFiles | None, catalog: Catalog, wall_clock: Callable[[], float]
) -> Tiers:
    """Memory, and disk where there are files."""
    ram = RamTier(config.budget_bytes, config.half_life_s)
    tiers = Tiers(ram, CostGate(enabled=config.cost_gate), clock=wall_clock)
    if files is not None:
        disk = DiskTier(
            files,
            catalog,
            config.disk_budget_bytes,
            config.half_life_s,
            may_go=lambda key: not tiers.is_pinned(key),
            on_gone=tiers.row_gone,
        )
        tiers.add_disk(disk, writes_behind=config.write_behind_s > 0)
    return tiers


def _open_data(config: KVStoreConfig) -> tuple[DiskFiles | None, Catalog]:
    if config.data_dir is None:
        return None, Catalog(":memory:", config.half_life_s)
    folder = open_folder(config.data_dir, config.half_life_s)
    return folder.files, folder.catalog
