"""The SQLite file of a catalog: one process's, opened or refused, written without waiting, made safe when asked.

Rows are written without waiting for the disk, so they survive the process; `sync` makes them survive the machine too.
What was written goes to a log first, which `checkpoint` moves into the database: that waits for the disk (28 ms on a
cloud machine's volume), so it runs on a thread, over a connection of its own, and no look-up waits for it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from spolia_core.errors import InvalidRequest
from spolia_kvstore.disk_files import sync_folder

CACHE_KIB = 32 << 10
MEMORY = ":memory:"
LOG_BYTES = 4 << 20
"""The log is moved into the database when it is larger, and cut to this."""

_NUMBERS_TABLE = "CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID"
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


class CatalogFile:
    """One file, or ":memory:". Not thread-safe, but for `sync` and `checkpoint`: the event loop owns it."""

    def __init__(self, path: str, tables: Sequence[str], version: int) -> None:
        """`tables`, as statements that make them, are those of schema `version`.

        Raises `CatalogUnusable`; for a file that is damaged or no database, whatever SQLite and its module raise.
        """
        self._path = path
        self._wal: int | None = None
        self._lock = None if path == MEMORY else _lock_of(path)
        try:
            with _told_from_damage(path):
                self.db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        except BaseException:
            self._unlock()
            raise
        with self.opening():
            self._open(tables, version)
            if path != MEMORY:
                self._wal = os.open(f"{path}-wal", os.O_RDWR)
                sync_folder(Path(path).parent)  # the names of both files are as safe as what `sync` writes

    @contextmanager
    def opening(self) -> Iterator[None]:
        """What is done before the file is used: when it fails, the file is closed. Raises as `__init__` does."""
        try:
            with _told_from_damage(self._path):
                yield
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written within is written whole, or not at all."""
        self.db.execute("BEGIN")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def check(self) -> None:
        """Reads the file's own structure. Raises `sqlite3.DatabaseError`, and closes it, when it is damaged."""
        try:
            problems = [text for (text,) in self.db.execute("PRAGMA quick_check(1)")]
            if problems != ["ok"]:
                raise sqlite3.DatabaseError(problems[0])
        except sqlite3.DatabaseError:
            self.close()
            raise

    def number(self, name: str) -> float | None:
        """A number that was kept under this name."""
        row: tuple[float] | None = self.db.execute("SELECT value FROM numbers WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def put_number(self, name: str, value: float) -> None:
        """Keeps it."""
        self.db.execute("INSERT OR REPLACE INTO numbers VALUES (?, ?)", (name, value))

    def next_number(self, name: str) -> int:
        """Counts up; never gives a number twice in the life of the file."""
        self.db.execute("INSERT INTO numbers VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1", (name,))
        (value,) = self.db.execute("SELECT value FROM numbers WHERE name = ?", (name,)).fetchone()
        return int(value)

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
        """Closes the file, which must not be used again. Idempotent."""
        if self._wal is not None:
            os.close(self._wal)
            self._wal = None
        self.db.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self, tables: Sequence[str], known_version: int) -> None:
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        if version not in (0, known_version):
            raise CatalogUnusable(f"the index has schema {version}, this release knows {known_version}")
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        self.db.execute("PRAGMA wal_autocheckpoint = 0")
        self.db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        self.db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        if version != known_version:  # nothing is written that is there: the disk may be full
            with self.transaction():
                for statement in (*tables, _NUMBERS_TABLE):
                    self.db.execute(statement)
                self.db.execute(f"PRAGMA user_version = {known_version}")


@contextmanager
def _told_from_damage(path: str) -> Iterator[None]:
    """Raises `CatalogUnusable` for what says nothing of what is in the file."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) or (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF in _NOT_ITS_FAULT:
            raise CatalogUnusable(f"index {path!r} cannot be used: {error}") from error
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
