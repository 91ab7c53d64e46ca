"""The rows of the disk tier: which files hold objects, and how these were used.

What changes often, and what the index refuses for now, is kept here and written at the next `flush`; answers are as if
it had been written. An index that cannot be read has no rows: reuse is lost, never an answer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from spolia_kvstore.catalog import Catalog, Totals
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_files import FileName
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.usage import Usage
from spolia_node.logs import get_log

ROWS_AT_ONCE = 64

log = get_log(__name__)


class DiskRows:
    """Used from one event loop. `on_gone` is told at once of rows that were dropped."""

    def __init__(self, catalog: Catalog, half_life_s: float, on_gone: Callable[[Row], None]) -> None:
        self.errors = 0
        """How often the index failed since the start."""
        self._catalog = catalog
        self._half_life_s = half_life_s
        self._on_gone = on_gone
        self._totals = catalog.totals(Tier.DISK)
        self._dead: set[FileName] = set()  # rows that could not be removed yet
        self._uses: dict[ObjectKey, Usage] = {}

    def __len__(self) -> int:
        return self._totals.num_objects

    @property
    def num_bytes(self) -> int:
        """Bytes of the objects that can be found."""
        return self._totals.num_bytes

    def find(self, keys: Sequence[ObjectKey]) -> dict[ObjectKey, Row]:
        """Rows of those keys that are on disk. Changes nothing. Where the index cannot be read there are none."""
        by_tenant: dict[str, list[bytes]] = {}
        for key in keys:
            by_tenant.setdefault(key.tenant_id, []).append(key.chunk_id)
        found: dict[ObjectKey, Row] = {}
        try:
            for tenant_id, ids in by_tenant.items():
                for row in self._catalog.lookup(tenant_id, ids).values():
                    key = row.record.key
                    if not self.has_gone(row):
                        found[key] = self._as_used(row)
        except sqlite3.Error as error:
            self.note_error("lookup", error)
        return found

    def walk(self, tenant_id: str = "", id_prefix: bytes = b"") -> Iterator[Row]:
        """Rows in the order of their keys, one tenant's or all."""
        for row in self._catalog.rows(Tier.DISK, tenant_id, id_prefix):
            if not self.has_gone(row):
                yield self._as_used(row)

    def use(self, row: Row, now: float, *, is_hit: bool) -> Usage:
        """Notes a use; `flush` writes it."""
        usage = self._usage_of(row).used(now, self._half_life_s, is_hit=is_hit)
        self._uses[row.record.key] = usage
        return usage

    def set_usage(self, key: ObjectKey, usage: Usage) -> None:
        """Takes over how an object in memory was used; `flush` writes it."""
        self._uses[key] = usage

    def flush(self) -> None:
        """Writes uses noted since the last time, and removes rows that could not be removed before."""
        uses, self._uses = self._uses, {}
        if uses:
            try:
                self._catalog.set_usage(uses.items())
            except sqlite3.Error as error:
                self._uses = uses | self._uses  # for the next time; what was noted since is newer
                self.note_error("uses", error)
        for name in list(self._dead):
            self._remove_again(name)

    def is_listed(self, row: Row) -> bool:
        """Whether this very file is the object's, as things are now."""
        found = self.find([row.record.key]).get(row.record.key)
        return found is not None and found.file_id == row.file_id

    def lowest(self, offset: int) -> list[Row]:
        """A page of rows by rank, lowest first, also of those that `has_gone`. None where the index cannot be read."""
        try:
            return self._catalog.lowest(Tier.DISK, offset, ROWS_AT_ONCE)
        except sqlite3.Error as error:
            self.note_error("evict", error)
            return []

    def has_gone(self, row: Row) -> bool:
        """Whether it was dropped, and the index has it still."""
        return name_of(row) in self._dead

    def lowest_of_tenant(self, tenant_id: str) -> Iterator[Row]:
        """A tenant's rows, lowest rank first. None may change meanwhile."""
        self.flush()
        offset = 0
        try:
            while rows := self._catalog.lowest_of_tenant(Tier.DISK, tenant_id, offset, ROWS_AT_ONCE):
                yield from (row for row in rows if not self.has_gone(row))
                offset += len(rows)
        except sqlite3.Error as error:
            self.note_error("evict", error)

    def add(self, row: Row) -> list[FileName] | None:
        """Lists a file; the files it replaces. None when the index could not take it."""
        key = row.record.key
        before = self.find([key]).get(key)
        try:
            self._catalog.put(row)
        except sqlite3.Error as error:
            self.note_error("put", error)
            return None
        self._uses.pop(key, None)
        self._count(1, row.record.size_bytes)
        if before is None:
            return []
        self._count(-1, -before.record.size_bytes)
        return [name_of(before)]

    def drop(self, rows: Sequence[Row]) -> None:
        """Removes rows that are listed, now or, where the index refuses, at a later flush; they are gone at once."""
        names = [name_of(row) for row in rows]
        self._dead.update(names)
        for row in rows:
            self._uses.pop(row.record.key, None)
            self._count(-1, -row.record.size_bytes)
        try:
            self._catalog.remove([name.key for name in names], Tier.DISK)
            self._dead.difference_update(names)
        except sqlite3.Error as error:
            self.note_error("remove", error)
        for row in rows:
            self._on_gone(row)

    def note_error(self, what: str, error: Exception) -> None:
        """Counts a failure of the index."""
        self.errors += 1
        log.warning("the index failed", what=what, error=str(error))

    def check_invariants(self) -> None:
        """Asserts that what is counted is there. For tests."""
        assert self._totals == self._catalog.totals(Tier.DISK)

    def _remove_again(self, name: FileName) -> None:
        """Removes a row that could not be removed before, unless another has taken its place."""
        try:
            found = self._catalog.lookup(name.key.tenant_id, [name.key.chunk_id]).get(name.key.chunk_id)
            if found is not None and found.file_id == name.file_id:
                self._catalog.remove([name.key], Tier.DISK)
            self._dead.discard(name)
        except sqlite3.Error as error:
            self.note_error("remove", error)

    def _usage_of(self, row: Row) -> Usage:
        return self._uses.get(row.record.key, row.usage)

    def _as_used(self, row: Row) -> Row:
        usage = self._uses.get(row.record.key)
        return row if usage is None else replace(row, usage=usage)

    def _count(self, num_objects: int, num_bytes: int) -> None:
        self._totals = Totals(self._totals.num_objects + num_objects, self._totals.num_bytes + num_bytes)


def name_of(row: Row) -> FileName:
    """The file a row names."""
    return FileName(row.record.key, row.file_id)
