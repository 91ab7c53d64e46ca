"""The index: what is stored where, for lookup, listing and counts.

One small set of methods over SQLite, so that another backend or tier fits behind it. Bytes are not here. Rows of the
RAM tier describe a process that has ended, and go when the index is opened.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from spolia_core.errors import InvalidRequest
from spolia_core.reuse import ChunkKind
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier

SCHEMA_VERSION = 1
MAX_VARIABLES = 500  # SQLite's own limit was 999 for long

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    tenant_id TEXT NOT NULL,
    chunk_id BLOB NOT NULL,
    tier INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    format_version INTEGER NOT NULL,
    codec TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    num_tokens INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    digest BLOB NOT NULL,
    replica TEXT NOT NULL,
    stored_at REAL NOT NULL,
    used_at REAL NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, chunk_id, tier)
) WITHOUT ROWID
"""
_COLUMNS = (
    "tenant_id, chunk_id, tier, kind, format_version, codec, fingerprint, num_tokens, size_bytes, digest, replica, "
    "stored_at, used_at, hits"
)


class IndexUnusable(InvalidRequest):
    """The index file cannot be used: locked by another process, not ours, or of another release."""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One stored object. Times are seconds since the epoch; `hits` counts the reads that found it."""

    record: ObjectRecord
    tier: Tier
    stored_at: float
    used_at: float
    hits: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Objects and their bytes."""

    num_objects: int
    num_bytes: int


class SqliteIndex:
    """The embedded index. `path` is a file, or ":memory:". Not thread-safe: the event loop owns it."""

    def __init__(self, path: str = ":memory:") -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
            self._open()
        except sqlite3.Error as error:
            raise IndexUnusable(f"index {path!r} cannot be used: {error}") from error
        self.remove_tier(Tier.RAM)

    def put(self, record: ObjectRecord, tier: Tier, now: float) -> None:
        """Adds or replaces the row of this object on this tier."""
        key = record.key
        values = (
            *(key.tenant_id, key.chunk_id, int(tier), int(record.kind), record.format_version, record.codec),
            *(record.fingerprint, record.num_tokens, record.size_bytes, record.digest, record.replica, now, now, 0),
        )
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT OR REPLACE INTO objects ({_COLUMNS}) VALUES ({marks})", values)

    def lookup(self, tenant_id: str, chunk_ids: Sequence[bytes]) -> dict[bytes, IndexRow]:
        """Rows of those ids that are stored; the fastest tier where there are several. Changes nothing."""
        found: dict[bytes, IndexRow] = {}
        for start in range(0, len(chunk_ids), MAX_VARIABLES):
            batch = chunk_ids[start : start + MAX_VARIABLES]
            marks = ", ".join("?" * len(batch))
            query = f"SELECT {_COLUMNS} FROM objects WHERE tenant_id = ? AND chunk_id IN ({marks}) ORDER BY tier DESC"
            for values in self._db.execute(query, (tenant_id, *batch)):
                row = _row(values)
                found[row.record.key.chunk_id] = row
        return found

    def list_tenant(self, tenant_id: str, limit: int) -> list[IndexRow]:
        """A tenant's rows, most recently used first."""
        query = f"SELECT {_COLUMNS} FROM objects WHERE tenant_id = ? ORDER BY used_at DESC, chunk_id LIMIT ?"
        return [_row(values) for values in self._db.execute(query, (tenant_id, limit))]

    def record_hits(self, keys: Iterable[ObjectKey], now: float) -> None:
        """Counts one read of each object."""
        with self._transaction():
            self._db.executemany(
                "UPDATE objects SET hits = hits + 1, used_at = ? WHERE tenant_id = ? AND chunk_id = ?",
                [(now, key.tenant_id, key.chunk_id) for key in keys],
            )

    def remove(self, keys: Iterable[ObjectKey], tier: Tier) -> None:
        """Forgets these objects on this tier; those not there are ignored."""
        with self._transaction():
            self._db.executemany(
                "DELETE FROM objects WHERE tenant_id = ? AND chunk_id = ? AND tier = ?",
                [(key.tenant_id, key.chunk_id, int(tier)) for key in keys],
            )

    def remove_tier(self, tier: Tier) -> None:
        """Forgets everything on a tier."""
        self._db.execute("DELETE FROM objects WHERE tier = ?", (int(tier),))

    def totals(self, tier: Tier) -> Totals:
        """What a tier holds, all tenants together."""
        query = "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM objects WHERE tier = ?"
        return Totals(*self._db.execute(query, (int(tier),)).fetchone())

    def close(self) -> None:
        """Closes the file. The index must not be used again."""
        self._db.close()

    def _open(self) -> None:
        # Two stores on one file would clear each other's rows, so the first keeps the lock. A row lost in a crash
        # costs a recomputation, so no write waits for the disk.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"it has schema {version}, this release knows {SCHEMA_VERSION}")
        self._db.execute(_SCHEMA)
        self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _row(values: Sequence[Any]) -> IndexRow:
    (tenant_id, chunk_id, tier, kind, version, codec, fingerprint, num_tokens, size, digest, replica, *rest) = values
    stored_at, used_at, hits = rest
    record = ObjectRecord(
        key=ObjectKey(tenant_id, chunk_id),
        kind=ChunkKind(kind),
        format_version=version,
        codec=codec,
        fingerprint=fingerprint,
        num_tokens=num_tokens,
        size_bytes=size,
        digest=digest,
        replica=replica,
    )
    return IndexRow(record, Tier(tier), stored_at, used_at, hits)
