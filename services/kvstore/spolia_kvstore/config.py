"""Settings of the kvstore process."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_kvstore.wire import MAX_CLAIM_TTL_MS, MAX_PIN_LEASE_MS
from spolia_node.config import NodeConfig, at_least, between, setting


@dataclass(frozen=True)
class KVStoreConfig(NodeConfig):
    """What a kvstore node can be told."""

    budget_bytes: int = setting(
        1 << 30,
        "Memory for chunk objects, in bytes, uploads included; raise it to what the machine can spare.",
        check=at_least(1),
    )
    max_object_bytes: int = setting(
        512 << 20,
        "Largest chunk object accepted, in bytes; raise it for long documents on large models.",
        check=at_least(1),
    )
    index_path: str = setting(
        ":memory:",
        "File of the index of stored objects; a file is worth having only with tiers that outlive the process.",
    )
    claim_ttl_ms: int = setting(
        30_000, "How long a claim holds that asks for no time, in milliseconds.", check=between(1, MAX_CLAIM_TTL_MS)
    )
    pin_lease_ms: int = setting(
        60_000, "How long a pin holds that asks for no time, in milliseconds.", check=between(1, MAX_PIN_LEASE_MS)
    )
    node_lease_ms: int = setting(
        3_000,
        "How long a node stays in the directory after its last heartbeat, in milliseconds; raise it on slow networks.",
        check=between(100, 600_000),
    )
