"""How much each tenant holds and may hold. An object counts once, on however many tiers it is."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spolia_core.errors import Busy, InvalidRequest
from spolia_core.key_book import KeyBook
from spolia_kvstore.catalog import Totals


@dataclass(frozen=True, slots=True)
class Quota:
    """Most bytes and objects of a tenant; 0 is no limit."""

    num_bytes: int = 0
    num_objects: int = 0


class Tenants:
    """What tenants hold, against their quotas."""

    def __init__(self, default: Quota | None = None, quotas: Mapping[str, Quota] | None = None) -> None:
        self._default = default or Quota()
        self._quotas = dict(quotas or {})
        self._held: dict[str, Totals] = {}

    def set_quotas(self, quotas: Mapping[str, Quota]) -> None:
        """Puts these in place of those of single tenants. A tenant that holds more than its own loses it as it adds."""
        self._quotas = dict(quotas)

    def held(self) -> dict[str, Totals]:
        """Tenants that hold something."""
        return dict(self._held)

    def quota(self, tenant_id: str) -> Quota:
        """A tenant's own quota, else the default."""
        return self._quotas.get(tenant_id, self._default)

    def add(self, tenant_id: str, num_bytes: int, num_objects: int = 1) -> None:
        """Counts what a tenant has got; negative for what it has lost."""
        held = self._held.get(tenant_id, Totals())
        # Never below nothing: an index that was damaged may have counted wrong.
        held = Totals(max(0, held.num_objects + num_objects), max(0, held.num_bytes + num_bytes))
        if held.num_objects:
            self._held[tenant_id] = held
        else:
            self._held.pop(tenant_id, None)

    def excess(self, tenant_id: str, num_bytes: int) -> Totals:
        """What of its own a tenant must lose before it may add one object of `num_bytes`; zeros when nothing."""
        held, quota = self._held.get(tenant_id, Totals()), self.quota(tenant_id)
        return Totals(
            max(0, held.num_objects + 1 - quota.num_objects) if quota.num_objects else 0,
            max(0, held.num_bytes + num_bytes - quota.num_bytes) if quota.num_bytes else 0,
        )

    def refusal(self, tenant_id: str, num_bytes: int) -> Busy:
        """For an object that its tenant's quota has no room for."""
        quota = self.quota(tenant_id)
        limits = [f"{quota.num_bytes} bytes"] * bool(quota.num_bytes)
        limits += [f"{quota.num_objects} objects"] * bool(quota.num_objects)
        return Busy(
            f"tenant {tenant_id!r} has no room for {num_bytes} bytes within its quota: the rest is pinned or in use",
            field="tenant_id",
            limit=", ".join(limits),
            actual=f"{num_bytes} bytes",
            retry_after_ms=0 if quota.num_bytes and num_bytes > quota.num_bytes else 1000,
        )


def read_quotas(path: Path) -> dict[str, Quota]:
    """Quotas of single tenants: a table for each, `["tenant name"]` with `bytes` and `objects`, either may be missing.

    Raises `InvalidRequest` naming the file and what is wrong in it.
    """
    try:
        with path.open("rb") as opened:
            tables = tomllib.load(opened)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"quotas_file {path} cannot be read: {error}", field="quotas_file") from error
    return {tenant_id: _quota_of(path, tenant_id, table) for tenant_id, table in tables.items()}


def quotas_in(book: KeyBook) -> dict[str, Quota]:
    """What the limits of tenants in a book of API keys allow them in a store."""
    return {
        tenant_id: Quota(num_bytes=limits.max_cache_bytes)
        for tenant_id, limits in book.limits.items()
        if limits.max_cache_bytes
    }


def _quota_of(path: Path, tenant_id: str, table: object) -> Quota:
    good = isinstance(table, dict) and set(table) <= {"bytes", "objects"}
    if not (isinstance(table, dict) and good and all(type(n) is int and n >= 0 for n in table.values())):
        raise InvalidRequest(
            f"quotas_file {path}: [{tenant_id}] may have bytes and objects, whole numbers ≥ 0, and nothing else",
            field="quotas_file",
            actual=str(table),
        )
    return Quota(table.get("bytes", 0), table.get("objects", 0))
