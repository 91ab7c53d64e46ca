"""The catalog: what this store keeps that outlives its process, in one SQLite file (`catalog_file.py`).

Objects on disk with how they were used; pins, claims that this store granted, and (for a store alone) members
(`catalog_leases.py`). Bytes are not here.

Where the file system is full or fails, methods raise `sqlite3.Error`; the callers decide what that costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from spolia_core.ids import ID_BYTES
from spolia_kvstore.catalog_file import MEMORY, CatalogFile
from spolia_kvstore.catalog_leases import CLAIMS, LEASE_TABLES, PINS, LeaseTable, MemberTable
from spolia_kvstore.catalog_row import COLUMNS, IS_DAMAGED, NUM_COLUMNS, OBJECTS_TABLE, Row, row_of, values_of
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.usage import Usage

SCHEMA_VERSION = 2
MAX_VARIABLES = 500  # SQLite's own limit was 999 for long
ROWS_AT_ONCE = 1000

_TABLES = (OBJECTS_TABLE, "CREATE INDEX IF NOT EXISTS objects_by_rank ON objects (tier, rank)", *LEASE_TABLES)


@dataclass(frozen=True, slots=True)
class Totals:
    """Objects and their bytes."""

    num_objects: int = 0
    num_bytes: int = 0


class Catalog(CatalogFile):
    """A catalog's file, and the objects in it: their rows on each tier."""

    def __init__(self, path: str = MEMORY, half_life_s: float = 900.0) -> None:
        """Raises as `CatalogFile` does. Rows of memory are those of another process, and forgotten."""
        super().__init__(path, _TABLES, SCHEMA_VERSION)
        self._half_life_s = half_life_s
        self.pins = LeaseTable(self, PINS)
        self.claims = LeaseTable(self, CLAIMS)
        self.members = MemberTable(self)
        with self.opening():
            self._set_half_life()
            if self.totals(Tier.RAM).num_objects:
                self.remove_tier(Tier.RAM)

    def drop_damaged(self) -> int:
        """Forgets rows that no release has written; files of objects are orphans then. Returns how many of these."""
        for table in (self.pins, self.claims, self.members):
            table.drop_damaged()
        return self.db.execute(f"DELETE FROM objects WHERE {IS_DAMAGED}").rowcount

    def put(self, row: Row) -> None:
        """Adds or replaces the row of this object on this tier."""
        self.put_many([row])

    def put_many(self, rows: Iterable[Row]) -> None:
        """Adds or replaces rows, all or none."""
        marks = ", ".join("?" * (NUM_COLUMNS + 1))
        with self.transaction():
            self.db.executemany(
                f"INSERT OR REPLACE INTO objects ({COLUMNS}, rank) VALUES ({marks})",
                [(*values_of(row), row.usage.rank(self._half_life_s)) for row in rows],
            )

    def lookup(self, tenant_id: str, chunk_ids: Sequence[bytes]) -> dict[bytes, Row]:
        """Rows of those ids that are stored; the fastest tier where there are several. Changes nothing."""
        return {chunk_id: rows[0] for chunk_id, rows in self.lookup_all(tenant_id, chunk_ids).items()}

    def lookup_all(self, tenant_id: str, chunk_ids: Sequence[bytes]) -> dict[bytes, list[Row]]:
        """Rows of those ids that are stored, fastest tier first. Changes nothing."""
        found: dict[bytes, list[Row]] = {}
        for start in range(0, len(chunk_ids), MAX_VARIABLES):
            batch = chunk_ids[start : start + MAX_VARIABLES]
            marks = ", ".join("?" * len(batch))
            query = f"SELECT {COLUMNS} FROM objects WHERE tenant_id = ? AND chunk_id IN ({marks})"
            for values in self.db.execute(query, (tenant_id, *batch)):
                row = row_of(values)
                if row is not None:
                    found.setdefault(row.record.key.chunk_id, []).append(row)
        for rows in found.values():
            rows.sort(key=lambda row: row.tier)
        return found

    def rows(self, tier: Tier, tenant_id: str = "", id_prefix: bytes = b"") -> Iterator[Row]:
        """Rows of a tier in the order of their keys, one tenant's or all. Rows may change meanwhile."""
        for tenant in [tenant_id] if tenant_id else sorted(self.totals_by_tenant(tier)):
            after, sign = id_prefix, ">="
            while True:
                query = (
                    f"SELECT {COLUMNS} FROM objects WHERE tenant_id = ? AND chunk_id {sign} ? AND chunk_id < ? "
                    f"AND tier = ? ORDER BY chunk_id LIMIT {ROWS_AT_ONCE}"
                )
                values = self.db.execute(query, (tenant, after, _end_of(id_prefix), int(tier))).fetchall()
                yield from _good_rows(values)
                if len(values) < ROWS_AT_ONCE:
                    break
                after, sign = values[-1][1], ">"

    def first_bytes(self, tier: Tier, tenant_id: str) -> set[int]:
        """The bytes with which a tenant's ids on a tier begin."""
        query = "SELECT DISTINCT substr(chunk_id, 1, 1) FROM objects WHERE tenant_id = ? AND tier = ?"
        return {first[0] for (first,) in self.db.execute(query, (tenant_id, int(tier))) if first}

    def lowest(self, tier: Tier, offset: int, limit: int) -> list[Row]:
        """Rows of a tier by rank, lowest first."""
        query = f"SELECT {COLUMNS} FROM objects WHERE tier = ? ORDER BY rank LIMIT ? OFFSET ?"
        return _good_rows(self.db.execute(query, (int(tier), limit, offset)))

    def lowest_of_tenant(self, tier: Tier, tenant_id: str, offset: int, limit: int) -> list[Row]:
        """A tenant's rows of a tier by rank, lowest first."""
        query = f"SELECT {COLUMNS} FROM objects WHERE tier = ? AND tenant_id = ? ORDER BY rank LIMIT ? OFFSET ?"
        return _good_rows(self.db.execute(query, (int(tier), tenant_id, limit, offset)))

    def set_usage(self, usages: Iterable[tuple[ObjectKey, Usage]]) -> None:
        """Keeps how objects were used, on every tier that has them."""
        with self.transaction():
            self.db.executemany(
                "UPDATE objects SET used_at = ?, log_uses = ?, hits = ?, rank = ? WHERE tenant_id = ? AND chunk_id = ?",
                [
                    (usage.used_at, usage.log_uses, usage.hits, usage.rank(self._half_life_s), *key)
                    for key, usage in usages
                ],
            )

    def remove(self, keys: Iterable[ObjectKey], tier: Tier) -> None:
        """Forgets these objects on this tier; those not there are ignored."""
        with self.transaction():
            self.db.executemany(
                "DELETE FROM objects WHERE tenant_id = ? AND chunk_id = ? AND tier = ?",
                [(*key, int(tier)) for key in keys],
            )

    def remove_tier(self, tier: Tier) -> None:
        """Forgets everything on a tier."""
        self.db.execute("DELETE FROM objects WHERE tier = ?", (int(tier),))

    def totals(self, tier: Tier) -> Totals:
        """What a tier holds, all tenants together."""
        query = "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM objects WHERE tier = ?"
        return Totals(*self.db.execute(query, (int(tier),)).fetchone())

    def totals_by_tenant(self, tier: Tier) -> dict[str, Totals]:
        """What each tenant has on a tier."""
        query = "SELECT tenant_id, COUNT(*), SUM(size_bytes) FROM objects WHERE tier = ? GROUP BY tenant_id"
        return {tenant_id: Totals(*rest) for tenant_id, *rest in self.db.execute(query, (int(tier),))}

    @property
    def is_whole(self) -> bool:
        """Whether every file has its row here: false for an index that is new or lost, until `mark_whole`."""
        return self.number("whole") is not None

    def mark_whole(self) -> None:
        """The rows of all files that were there are written."""
        self.put_number("whole", 1)

    def _set_half_life(self) -> None:
        """Ranks are of one half-life: another one makes them all anew."""
        if self.number("half_life_s") != self._half_life_s:
            self.db.execute("UPDATE objects SET rank = log_cost + log_uses + used_at / ?", (self._half_life_s,))
            self.put_number("half_life_s", self._half_life_s)


def _good_rows(values: Iterable[Sequence[Any]]) -> list[Row]:
    """A row that is damaged counts as absent: its file is an orphan, which the next start collects."""
    return [row for each in values if (row := row_of(each)) is not None]


def _end_of(id_prefix: bytes) -> bytes:
    """Greater than every id with this prefix, and no greater than any behind them."""
    stripped = id_prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\xff" * (ID_BYTES + 1)
