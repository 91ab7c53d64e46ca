"""Checks what is asked of stores, and cuts it into what messages take."""

from __future__ import annotations

from collections.abc import Iterable

from spolia.argument_checks import check_not_empty, checked_float, checked_items, wrong_type
from spolia.store_results import ObjectName
from spolia_core.errors import InvalidRequest

MIN_LEASE_S, MAX_LEASE_S = 0.001, 3600.0
MAX_IDS = 4096
"""Limits of the contract: of a pin, and of ids in one message."""

Batch = tuple[str, list[bytes]]
"""A tenant, and ids of its chunks."""


def batches_of(objects: Iterable[ObjectName]) -> list[Batch]:
    """The objects as requests name them: ids of one tenant, each once, no more than a message takes."""
    by_tenant: dict[str, dict[bytes, None]] = {}
    for index, item in enumerate(checked_items(objects, "objects", "an iterable of ObjectName")):
        if not isinstance(item, ObjectName):
            raise wrong_type(item, f"objects[{index}]", "ObjectName")
        by_tenant.setdefault(item.tenant_id, {})[item.chunk_id] = None
    check_not_empty(list(by_tenant), "objects", "object")
    return [
        (tenant_id, list(ids)[start : start + MAX_IDS])
        for tenant_id, ids in by_tenant.items()
        for start in range(0, len(ids), MAX_IDS)
    ]


def checked_lease_ms(lease_s: object) -> int:
    """`lease_s`, how long a pin holds, in milliseconds."""
    seconds = checked_float(lease_s, "lease_s")
    if not MIN_LEASE_S <= seconds <= MAX_LEASE_S:
        limit = f"{MIN_LEASE_S:g} … {MAX_LEASE_S:.0f} seconds"
        raise InvalidRequest(
            f"lease_s must be {limit}, got {seconds}", field="lease_s", limit=limit, actual=str(seconds)
        )
    return round(seconds * 1000)


def checked_idle_s(idle_s: object) -> float:
    """`idle_s`, seconds without use; 0 is none in particular."""
    seconds = checked_float(idle_s, "idle_s")
    if not 0 <= seconds < float("inf"):
        raise InvalidRequest(
            f"idle_s must be ≥ 0 and finite, got {seconds}", field="idle_s", limit="≥ 0", actual=str(seconds)
        )
    return seconds
