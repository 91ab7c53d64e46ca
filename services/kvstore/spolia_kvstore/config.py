"""Settings of the kvstore process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spolia_kvstore.limits import MAX_CLAIM_TTL_MS, MAX_PIN_LEASE_MS
from spolia_kvstore.stable_id import stable_id
from spolia_node.config import NodeConfig, at_least, between, setting


@dataclass(frozen=True)
class KVStoreConfig(NodeConfig):
    """What a kvstore node can be told."""

    budget_bytes: int = setting(
        1 << 30,
        "Memory for chunk objects, in bytes, uploads included; raise it to what the machine can spare.",
        check=at_least(1),
    )
    data_dir: Path | None = setting(
        None,
        "Folder of the disk tier and of the index, for this store alone; none: everything is in memory and ends with "
        "the process.",
    )
    disk_budget_bytes: int = setting(
        10 << 30,
        "Disk for chunk objects under data_dir, in bytes; raise it to what the disk can spare.",
        check=at_least(1),
    )
    write_behind_s: float = setting(
        2.0,
        "Seconds after which what is in memory only is written to data_dir too: a crash loses no more than that; 0: "
        "what is evicted is written, and the rest when the process ends in order.",
        check=between(0.0, 1e9),
    )
    redis_url: str = setting(
        "",
        "Redis by which several stores share index, claims and membership: a redis://, rediss:// or unix:// URL, or "
        "for Redis Cluster redis+cluster://, for Sentinels redis+sentinel://HOST,HOST/NAME; empty: this one is alone.",
        secret=True,
    )
    redis_prefix: str = setting("spolia", "First part of every key in Redis; one for each cluster of nodes.")
    max_object_bytes: int = setting(
        512 << 20,
        "Largest chunk object accepted, in bytes; raise it for long documents on large models.",
        check=at_least(1),
    )
    tenant_quota_bytes: int = setting(
        0, "Most bytes of objects a tenant may hold in this store; 0: no limit.", check=at_least(0)
    )
    tenant_quota_objects: int = setting(
        0, "Most objects a tenant may hold in this store; 0: no limit.", check=at_least(0)
    )
    quotas_file: Path | None = setting(
        None, "TOML file with quotas of single tenants: a table for each, named for it, with bytes and objects."
    )
    keys: str = setting(
        "",
        "API keys as gateways are given them: a file, or the URL of a Redis. Their tenants' max_cache_bytes are quotas "
        "here; quotas_file goes before them.",
        secret=True,
    )
    half_life_s: float = setting(
        900.0,
        "Seconds after which a use counts half when it is decided what to evict; lower it where traffic changes fast.",
        check=between(1.0, 1e9),
    )
    cost_gate: bool = setting(
        True, "Do not serve from a tier that is measured to be slower than computing the chunk again."
    )
    claim_ttl_ms: int = setting(
        30_000, "How long a claim holds that asks for no time, in milliseconds.", check=between(1, MAX_CLAIM_TTL_MS)
    )
    pin_lease_ms: int = setting(
        60_000, "How long a pin holds that asks for no time, in milliseconds.", check=between(1, MAX_PIN_LEASE_MS)
    )
    node_lease_ms: int = setting(
        10_000,
        "How long a node stays in the directory after its last heartbeat, in milliseconds. A node that dies is noticed "
        "at once, by its broken stream; this is for one that is cut off, or too busy to speak.",
        check=between(100, 600_000),
    )

    def __post_init__(self) -> None:
        is_named = bool(self.node_id)
        super().__post_init__()
        if not is_named and self.data_dir is not None:
            self._fill("node_id", stable_id(self.data_dir) or self.node_id)
