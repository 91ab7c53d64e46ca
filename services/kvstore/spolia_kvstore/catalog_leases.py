"""What a catalog keeps for a time: pins and claims on objects, and the members of the cluster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from spolia_kvstore.catalog_file import CatalogFile
from spolia_kvstore.objects import ObjectKey

PINS, CLAIMS = "pins", "claims"

LEASE_TABLES = (
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
)
_IS_NO_LEASE = (
    "typeof(tenant_id) != 'text' OR typeof(chunk_id) != 'blob' OR typeof(owner) != 'text' OR typeof(until) != 'real'"
)


class Lease(NamedTuple):
    """A pin or a claim; `until` in seconds since the epoch."""

    key: ObjectKey
    owner: str
    until: float


class LeaseTable:
    """Pins, of which a key may have several, or claims, of which it has one."""

    def __init__(self, file: CatalogFile, name: str) -> None:
        """`name` is PINS or CLAIMS."""
        self._file = file
        self._name = name

    def put(self, leases: Iterable[Lease]) -> None:
        """Adds or renews them, all or none."""
        with self._file.transaction():
            self._file.db.executemany(
                f"INSERT OR REPLACE INTO {self._name} VALUES (?, ?, ?, ?)",
                [(*lease.key, lease.owner, lease.until) for lease in leases],
            )

    def remove(self, leases: Iterable[tuple[ObjectKey, str]]) -> None:
        """Ends those of these owners."""
        with self._file.transaction():
            self._file.db.executemany(
                f"DELETE FROM {self._name} WHERE tenant_id = ? AND chunk_id = ? AND owner = ?",
                [(*key, owner) for key, owner in leases],
            )

    def standing(self, now: float) -> list[Lease]:
        """Those that have not run out; the others are forgotten."""
        db = self._file.db
        if db.execute(f"SELECT 1 FROM {self._name} WHERE until <= ? LIMIT 1", (now,)).fetchone():
            db.execute(f"DELETE FROM {self._name} WHERE until <= ?", (now,))
        rows = db.execute(f"SELECT tenant_id, chunk_id, owner, until FROM {self._name}")
        return [Lease(ObjectKey(tenant_id, chunk_id), owner, until) for tenant_id, chunk_id, owner, until in rows]

    def drop_damaged(self) -> None:
        """Forgets rows that no release has written."""
        self._file.db.execute(f"DELETE FROM {self._name} WHERE {_IS_NO_LEASE}")


class MemberTable:
    """Members: a record, and a lease that is renewed more often."""

    def __init__(self, file: CatalogFile) -> None:
        self._file = file

    def put(self, node_id: str, session: int, record: bytes) -> None:
        """Adds a member, or changes its record. It is none without a lease."""
        self._file.db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", (node_id, session, record))

    def renew(self, node_id: str, until: float) -> None:
        """Gives a member a lease."""
        self._file.db.execute("INSERT OR REPLACE INTO member_leases VALUES (?, ?)", (node_id, until))

    def remove(self, node_id: str) -> None:
        """Forgets a member."""
        for table in ("members", "member_leases"):
            self._file.db.execute(f"DELETE FROM {table} WHERE node_id = ?", (node_id,))

    def all(self) -> list[tuple[str, int, bytes, float]]:
        """All members: id, session, record, until."""
        query = (
            "SELECT node_id, session, record, until FROM members JOIN member_leases USING (node_id) ORDER BY node_id"
        )
        return list(self._file.db.execute(query))

    def drop_damaged(self) -> None:
        """Forgets rows that no release has written."""
        self._file.db.execute(
            "DELETE FROM members "
            "WHERE typeof(node_id) != 'text' OR typeof(session) != 'integer' OR typeof(record) != 'blob'"
        )
        self._file.db.execute("DELETE FROM member_leases WHERE typeof(node_id) != 'text' OR typeof(until) != 'real'")
