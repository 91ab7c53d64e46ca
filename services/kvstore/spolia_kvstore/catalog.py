"""The catalog: what this store keeps that outlives its process, in one SQLite file.

Objects on disk with how they were used, pins, claims that this store granted, and (for a store alone) members. Bytes
are not here. Rows are written without waiting for the disk, so they survive the process; `sync` makes them survive the
machine too. What was written goes to a log first, which `checkpoint` moves into the database: that waits for the disk
(28 ms on a cloud machine's volume), so it runs on a thread, over a connection of its own, and no look-up waits for it.

Where the file system is full or fails, methods raise `sqlite3.Error`; the callers decide what that costs.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spolia_core.errors import InvalidRequest
from spolia_core.ids import ID_BYTES
from spolia_kvstore.catalog_row import COLUMNS, IS_DAMAGED, NUM_COLUMNS, OBJECTS_TABLE, Row, row_of, values_of
from spolia_kvstore.disk_files import sync_folder
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.usage import Usage

SCHEMA_VERSION = 2
MAX_VARIABLES = 500  # SQLite's own limit was 999 for long
CACHE_KIB = 32 << 10
MEMORY = ":memory:"
ROWS_AT_ONCE = 1000
LOG_BYTES = 4 << 20
"""The log is moved into the database when it is larger, and cut to this."""


_SCHEMA = (
    OBJECTS_TABLE,
    "CREATE INDEX IF NOT EXISTS objects_by_rank ON objects (tier, rank)",
    """
CREATE TABLE IF NOT EXISTS pins (
    tenant_id TEXT NOT NULL, chunk_id BLOB NOT NULL, owner TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (tenant_id, chunk_id, owner)
) WITHOUT ROWID
""",
    """
CREATE TABLE IF NOT EXISTS claims (
    tenant_id TEXT NOT NULL, chunk_id BLOB NOT NULL, owner TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (tenant_id, chunk_id)
) WITHOUT ROWID
""",
    """
CREATE TABLE IF NOT EXISTS members (
    node_id TEXT PRIMARY KEY, session INTEGER NOT NULL, record BLOB NOT NULL
) WITHOUT ROWID
""",
    # Apart from the records, which are large and change seldom.
    "CREATE TABLE IF NOT EXISTS member_leases (node_id TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID",
)
_IS_NO_LEASE = (
    "typeof(tenant_id) != 'text' OR typeof(chunk_id) != 'blob' OR typeof(owner) != 'text' OR typeof(until) != 'real'"
)
_DAMAGED_LEASES = {
    "pins": _IS_NO_LEASE,
    "claims": _IS_NO_LEASE,
    "members": "typeof(node_id) != 'text' OR typeof(session) != 'integer' OR typeof(record) != 'blob'",
    "member_leases": "typeof(node_id) != 'text' OR typeof(until) != 'real'",
}
_NOT_ITS_FAULT = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    }
)
"""Primary error codes that say nothing of what is in the file."""


class CatalogUnusable(InvalidRequest):
    """The file cannot be used: locked by another process, of another release, or its disk is full or fails."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Objects and their bytes."""

    num_objects: int = 0
    num_bytes: int = 0


class Lease(NamedTuple):
    """A pin or a claim; `until` in seconds since the epoch."""

    key: ObjectKey
    owner: str
    until: float


class Catalog:
    """One SQLite file, or ":memory:". Not thread-safe, but for `sync` and `checkpoint`: the event loop owns it."""

    def __init__(self, path: str = MEMORY, half_life_s: float = 900.0) -> None:
        """Raises `CatalogUnusable`; for a file that is damaged or no database, whatever SQLite and its module raise."""
        self._path = path
        self._half_life_s = half_life_s
        self._wal: int | None = None
        self._lock = None if path == MEMORY else _lock_of(path)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
            try:
                self._open()
                if path != MEMORY:
                    self._wal = os.open(f"{path}-wal", os.O_RDWR)
                    sync_folder(Path(path).parent)  # the names of both files are as safe as what `sync` writes
            except BaseException:
                self._db.close()
                raise
        except BaseException as error:
            self._unlock()
            if isinstance(error, OSError) or (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF in _NOT_ITS_FAULT:
                raise CatalogUnusable(f"index {path!r} cannot be used: {error}") from error
            raise

    def check(self) -> None:
        """Reads the file's own structure. Raises `sqlite3.DatabaseError`, and closes it, when it is damaged."""
        try:
            problems = [text for (text,) in self._db.execute("PRAGMA quick_check(1)")]
            if problems != ["ok"]:
                raise sqlite3.DatabaseError(problems[0])
        except sqlite3.DatabaseError:
            self.close()
            raise

    def drop_damaged(self) -> int:
        """Forgets rows that no release has written; files of objects are orphans then. Returns how many of these."""
        for table, condition in _DAMAGED_LEASES.items():
            self._db.execute(f"DELETE FROM {table} WHERE {condition}")
        return self._db.execute(f"DELETE FROM objects WHERE {IS_DAMAGED}").rowcount

    def put(self, row: Row) -> None:
        """Adds or replaces the row of this object on this tier."""
        self.put_many([row])

    def put_many(self, rows: Iterable[Row]) -> None:
        """Adds or replaces rows, all or none."""
        marks = ", ".join("?" * (NUM_COLUMNS + 1))
        with self._transaction():
            self._db.executemany(
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
            for values in self._db.execute(query, (tenant_id, *batch)):
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
                values = self._db.execute(query, (tenant, after, _end_of(id_prefix), int(tier))).fetchall()
                yield from _good_rows(values)
                if len(values) < ROWS_AT_ONCE:
                    break
                after, sign = values[-1][1], ">"

    def first_bytes(self, tier: Tier, tenant_id: str) -> set[int]:
        """The bytes with which a tenant's ids on a tier begin."""
        query = "SELECT DISTINCT substr(chunk_id, 1, 1) FROM objects WHERE tenant_id = ? AND tier = ?"
        return {first[0] for (first,) in self._db.execute(query, (tenant_id, int(tier))) if first}

    def lowest(self, tier: Tier, offset: int, limit: int) -> list[Row]:
        """Rows of a tier by rank, lowest first."""
        query = f"SELECT {COLUMNS} FROM objects WHERE tier = ? ORDER BY rank LIMIT ? OFFSET ?"
        return _good_rows(self._db.execute(query, (int(tier), limit, offset)))

    def lowest_of_tenant(self, tier: Tier, tenant_id: str, offset: int, limit: int) -> list[Row]:
        """A tenant's rows of a tier by rank, lowest first."""
        query = f"SELECT {COLUMNS} FROM objects WHERE tier = ? AND tenant_id = ? ORDER BY rank LIMIT ? OFFSET ?"
        return _good_rows(self._db.execute(query, (int(tier), tenant_id, limit, offset)))

    def set_usage(self, usages: Iterable[tuple[ObjectKey, Usage]]) -> None:
        """Keeps how objects were used, on every tier that has them."""
        with self._transaction():
            self._db.executemany(
                "UPDATE objects SET used_at = ?, log_uses = ?, hits = ?, rank = ? WHERE tenant_id = ? AND chunk_id = ?",
                [
                    (usage.used_at, usage.log_uses, usage.hits, usage.rank(self._half_life_s), *key)
                    for key, usage in usages
                ],
            )

    def remove(self, keys: Iterable[ObjectKey], tier: Tier) -> None:
        """Forgets these objects on this tier; those not there are ignored."""
        with self._transaction():
            self._db.executemany(
                "DELETE FROM objects WHERE tenant_id = ? AND chunk_id = ? AND tier = ?",
                [(*key, int(tier)) for key in keys],
            )

    def remove_tier(self, tier: Tier) -> None:
        """Forgets everything on a tier."""
        self._db.execute("DELETE FROM objects WHERE tier = ?", (int(tier),))

    def totals(self, tier: Tier) -> Totals:
        """What a tier holds, all tenants together."""
        query = "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM objects WHERE tier = ?"
        return Totals(*self._db.execute(query, (int(tier),)).fetchone())

    def totals_by_tenant(self, tier: Tier) -> dict[str, Totals]:
        """What each tenant has on a tier."""
        query = "SELECT tenant_id, COUNT(*), SUM(size_bytes) FROM objects WHERE tier = ? GROUP BY tenant_id"
        return {tenant_id: Totals(*rest) for tenant_id, *rest in self._db.execute(query, (int(tier),))}

    def put_leases(self, table: str, leases: Iterable[Lease]) -> None:
        """Adds or renews pins or claims; `table` is "pins" or "claims"."""
        with self._transaction():
            self._db.executemany(
                f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)",
                [(*lease.key, lease.owner, lease.until) for lease in leases],
            )

    def remove_leases(self, table: str, leases: Iterable[tuple[ObjectKey, str]]) -> None:
        """Ends pins or claims of these owners."""
        with self._transaction():
            self._db.executemany(
                f"DELETE FROM {table} WHERE tenant_id = ? AND chunk_id = ? AND owner = ?",
                [(*key, owner) for key, owner in leases],
            )

    def leases(self, table: str, now: float) -> list[Lease]:
        """Pins or claims that have not run out; the others are forgotten."""
        if self._db.execute(f"SELECT 1 FROM {table} WHERE until <= ? LIMIT 1", (now,)).fetchone():
            self._db.execute(f"DELETE FROM {table} WHERE until <= ?", (now,))
        rows = self._db.execute(f"SELECT tenant_id, chunk_id, owner, until FROM {table}")
        return [Lease(ObjectKey(tenant_id, chunk_id), owner, until) for tenant_id, chunk_id, owner, until in rows]

    def put_member(self, node_id: str, session: int, record: bytes) -> None:
        """Adds a member, or changes its record. It is none without a lease."""
        self._db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", (node_id, session, record))

    def renew_member(self, node_id: str, until: float) -> None:
        """Gives a member a lease."""
        self._db.execute("INSERT OR REPLACE INTO member_leases VALUES (?, ?)", (node_id, until))

    def remove_member(self, node_id: str) -> None:
        """Forgets a member."""
        for table in ("members", "member_leases"):
            self._db.execute(f"DELETE FROM {table} WHERE node_id = ?", (node_id,))

    def members(self) -> list[tuple[str, int, bytes, float]]:
        """All members: id, session, record, until."""
        query = (
            "SELECT node_id, session, record, until FROM members JOIN member_leases USING (node_id) ORDER BY node_id"
        )
        return list(self._db.execute(query))

    def next_number(self, name: str) -> int:
        """Counts up; never gives a number twice in the life of the file."""
        self._db.execute(
            "INSERT INTO numbers VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1", (name,)
        )
        (value,) = self._db.execute("SELECT value FROM numbers WHERE name = ?", (name,)).fetchone()
        return int(value)

    @property
    def is_whole(self) -> bool:
        """Whether every file has its row here: false for an index that is new or lost, until `mark_whole`."""
        return self._db.execute("SELECT 1 FROM numbers WHERE name = 'whole'").fetchone() is not None

    def mark_whole(self) -> None:
        """The rows of all files that were there are written."""
        self._db.execute("INSERT OR REPLACE INTO numbers VALUES ('whole', 1)")

    def sync(self) -> None:
        """Makes every row written before durable. Blocks for the disk; may run on any thread. Raises `OSError`.

        Rows are appended to the write-ahead log by plain writes, so syncing that file is all a commit lacks; SQLite
        syncs it itself before it moves rows into the database and begins the log anew. Its locks are on the other file.
        """
        if self._wal is not None:
            os.fsync(self._wal)

    @property
    def log_bytes(self) -> int:
        """Size of the log that `checkpoint` moves into the database; the log is then written from its start again."""
        return 0 if self._wal is None else os.fstat(self._wal).st_size

    def checkpoint(self) -> None:
        """Moves the log into the database, and makes that durable. Blocks for the disk; may run on any thread, one at a
        time. Raises `sqlite3.Error`.
        """
        if self._path != MEMORY:
            with closing(sqlite3.connect(self._path, isolation_level=None, timeout=1.0)) as db:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Closes the file. The catalog must not be used again. Idempotent."""
        if self._wal is not None:
            os.close(self._wal)
            self._wal = None
        self._db.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise CatalogUnusable(f"the index has schema {version}, this release knows {SCHEMA_VERSION}")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA wal_autocheckpoint = 0")
        self._db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        if version != SCHEMA_VERSION:  # nothing is written that is there: the disk may be full
            with self._transaction():
                for statement in _SCHEMA:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._set_half_life()
        if self.totals(Tier.RAM).num_objects:
            self.remove_tier(Tier.RAM)

    def _set_half_life(self) -> None:
        """Ranks are of one half-life: another one makes them all anew."""
        row = self._db.execute("SELECT value FROM numbers WHERE name = 'half_life_s'").fetchone()
        if row is None or row[0] != self._half_life_s:
            self._db.execute("UPDATE objects SET rank = log_cost + log_uses + used_at / ?", (self._half_life_s,))
            self._db.execute("INSERT OR REPLACE INTO numbers VALUES ('half_life_s', ?)", (self._half_life_s,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _lock_of(path: str) -> int:
    """The lock of the file, which ends with the process: two stores on one file would clear each other's rows."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(lock)
            raise
    except BlockingIOError as error:
        raise CatalogUnusable(
            f"index {path!r} cannot be used: it is locked by another process, a store that uses its folder"
        ) from error
    except OSError as error:
        raise CatalogUnusable(f"index {path!r} cannot be used: {error}") from error
    return lock


def _good_rows(values: Iterable[Sequence[Any]]) -> list[Row]:
    """A row that is damaged counts as absent: its file is an orphan, which the next start collects."""
    return [row for each in values if (row := row_of(each)) is not None]


def _end_of(id_prefix: bytes) -> bytes:
    """Greater than every id with this prefix, and no greater than any behind them."""
    stripped = id_prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\xff" * (ID_BYTES + 1)
