"""The disk tier: files and their rows together, under a byte budget.

A row is written after its file is in place and removed before its file is: what a row names is there, and a file
without a row is an orphan, which the next start collects. A few threads read and write files; the event loop, rows.

A disk that is full or fails costs reuse, never an answer: writes return false, reads raise `OSError` for the caller to
make a miss of, and both are counted.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from spolia_kvstore.catalog import Catalog
from spolia_kvstore.catalog_file import LOG_BYTES
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_files import DiskFiles, FileName
from spolia_kvstore.disk_rows import DiskRows, name_of
from spolia_kvstore.object_file import ObjectFile
from spolia_kvstore.objects import ObjectKey
from spolia_node.logs import get_log
from spolia_node.tracing import current_span

NUM_THREADS = 4
RETRY_AFTER_S = 5.0
"""After a write that failed, how long nothing is written that nobody waits for."""

_OF_THE_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EACCES, errno.EPERM})
"""Errors that say nothing of the file: it may be read the next time."""

T = TypeVar("T")

log = get_log(__name__)


@dataclass(slots=True)
class DiskCounters:
    """Counts since the start."""

    evictions: int = 0
    evicted_bytes: int = 0
    quarantined: int = 0
    written_bytes: int = 0
    write_seconds: float = 0.0
    read_errors: int = 0
    write_errors: int = 0


class DiskTier:
    """Objects in files. Used from one event loop. `on_gone` is told at once of rows that were deleted, evicted or taken
    out of service.

    `may_go` says whether eviction may take an object, apart from those being read, which it never takes.
    """

    def __init__(
        self,
        files: DiskFiles,
        catalog: Catalog,
        budget_bytes: int,
        half_life_s: float,
        *,
        may_go: Callable[[ObjectKey], bool],
        on_gone: Callable[[Row], None],
    ) -> None:
        self.files = files
        self.catalog = catalog
        self.budget_bytes = budget_bytes
        self.counters = DiskCounters()
        self.rows = DiskRows(catalog, half_life_s, on_gone)
        self.healthy = True
        self._half_life_s = half_life_s
        self._may_go = may_go
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="disk")
        self._promised_bytes = 0
        self._readers: Counter[ObjectKey] = Counter()
        self._writing: set[FileName] = set()
        self._failed_at = float("-inf")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def used_bytes(self) -> int:
        """Bytes of the objects that can be found."""
        return self.rows.num_bytes

    @property
    def num_errors(self) -> int:
        """All that failed since the start."""
        return self.counters.read_errors + self.counters.write_errors + self.rows.errors

    @property
    def num_readers(self) -> int:
        """Holds under way."""
        return self._readers.total()

    @property
    def takes_writes(self) -> bool:
        """Whether to write what nobody waits for: not for a while after a write failed."""
        return self.healthy or time.monotonic() - self._failed_at > RETRY_AFTER_S

    def is_writing(self, name: FileName) -> bool:
        """Whether this file may be there before its row is."""
        return name in self._writing

    async def tidy(self) -> None:
        """Writes uses, and moves the index's log into its database once it has grown. Called now and then."""
        self.rows.flush()
        await self._make_room()  # the budget may be smaller than at the last start
        if self.catalog.log_bytes > LOG_BYTES:
            try:
                await self.in_thread(self.catalog.checkpoint)
            except sqlite3.Error as error:
                self.rows.note_error("checkpoint", error)

    def hold(self, key: ObjectKey) -> None:
        """Keeps an object from eviction until `release`."""
        self._readers[key] += 1

    def release(self, key: ObjectKey) -> None:
        """Ends one `hold`."""
        self._readers[key] -= 1
        if self._readers[key] <= 0:
            del self._readers[key]

    def is_read(self, key: ObjectKey) -> bool:
        """Whether somebody holds it."""
        return key in self._readers

    async def evict(self, keys: Sequence[ObjectKey]) -> None:
        """Drops these objects to make room for others."""
        await self._drop_evicted(list(self.rows.find(keys).values()))

    async def open(self, row: Row) -> ObjectFile:
        """Opens the object's file. Raises `OSError`; one that is gone or has another length is taken out of service."""
        path = self.files.path_of(name_of(row))
        opening = asyncio.get_running_loop().run_in_executor(self._threads, ObjectFile, path, row.record.size_bytes)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_late)
            raise
        except OSError as error:
            await self.note_read_error(row, error)
            raise

    async def note_read_error(self, row: Row, error: OSError) -> None:
        """Counts a read that failed; takes the object out of service, unless it was the process that failed."""
        self.counters.read_errors += self.rows.is_listed(row)
        if error.errno in _OF_THE_PROCESS:
            log.warning("object not read", chunk_id=row.record.key.chunk_id.hex(), error=str(error))
        else:
            await self.take_out(row, f"cannot be read: {error}")

    async def write(
        self,
        row: Row,
        pieces: Callable[[], Iterator[memoryview]],
        is_wanted: Callable[[], bool],
        on_listed: Callable[[], None],
    ) -> bool:
        """Makes room, writes a file that survives the machine, then its row, which `sync` makes as safe.

        False when that could not be. `is_wanted` is asked once the file is there: what was deleted meanwhile gets no
        row. `on_listed` is called at the moment from which the object can be found here.
        """
        name, size = name_of(row), row.record.size_bytes
        self._promised_bytes += size
        self._writing.add(name)
        try:
            if not (await self._make_room() and await self._write_file(name, size, pieces)):
                return False
            replaced = self.rows.add(row) if is_wanted() else None
            if replaced is None and is_wanted() and await self._evict(size):  # the index may lack room as files do
                replaced = self.rows.add(row) if is_wanted() else None
            if replaced is None:
                await self._remove_files([name])
                return False
            self.healthy = True
            on_listed()
            await self._remove_files(replaced)
            return True
        except OSError as error:
            self._note_write_error(name.key, error)
            return False
        finally:
            self._writing.discard(name)
            self._promised_bytes -= size

    async def remove(self, keys: Sequence[ObjectKey]) -> list[Row]:
        """Deletes rows, at once, then files; durable when it returns, as far as the disk goes along. Returns the rows
        there were. Readers that have the file open finish."""
        rows = list(self.rows.find(keys).values())
        self.rows.drop(rows)
        await self._remove_files([name_of(row) for row in rows])
        if rows:
            await self.sync()
        return rows

    async def sync(self) -> bool:
        """Makes rows survive the machine too; false when the disk refused."""
        try:
            await self.in_thread(self.catalog.sync)
        except OSError as error:
            self.rows.note_error("sync", error)
            return False
        return True

    async def take_out(self, row: Row, reason: str) -> None:
        """Quarantines an object whose bytes are not what they were, or cannot be had."""
        if not self.rows.is_listed(row):
            return  # deleted meanwhile, or taken out by another reader
        key = row.record.key
        log.warning(
            "object quarantined",
            tenant=key.tenant_id,
            chunk_id=key.chunk_id.hex(),
            replica=row.record.replica,
            reason=reason,
        )
        self.counters.quarantined += 1
        self.rows.drop([row])
        try:
            await self.in_thread(lambda: self.files.quarantine(name_of(row)))
        except OSError as error:
            log.warning("file not moved to quarantine", chunk_id=key.chunk_id.hex(), error=str(error))

    def admission(self) -> Callable[[int, float], bool]:
        """Says of a size and a rank whether there is room without evicting any of higher rank, as things are now."""
        free = self.budget_bytes - self.used_bytes - self._promised_bytes
        lowest: list[float] = []

        def admits(size: int, rank: float) -> bool:
            if size <= free:
                return True
            if not lowest:
                self.rows.flush()
                rows = self.rows.lowest(0)
                lowest.append(rows[0].usage.rank(self._half_life_s) if rows else float("inf"))
            return lowest[0] < rank

        return admits

    async def close(self) -> None:
        """Writes what is noted and ends the threads. Idempotent."""
        self.rows.flush()
        await asyncio.to_thread(self._threads.shutdown)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs `work` on a thread of the disk. A caller still waits for it, however often it is cancelled, so nothing
        that it uses goes away."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if not running.cancelled():
                running.exception()  # nobody is left to hear of it
            raise cancelled
        return running.result()

    async def _make_room(self) -> bool:
        """Evicts by rank until what is promised fits."""
        await self._shrink()
        while (missing := self.used_bytes + self._promised_bytes - self.budget_bytes) > 0:
            if not await self._evict(missing):
                return False
        return True

    async def _shrink(self) -> None:
        """Evicts down to a budget that is smaller than at the last start, a page at a time: others come first."""
        offset = 0
        while (excess := self.used_bytes - self.budget_bytes) > 0 and (rows := self.rows.lowest(offset)):
            victims = []
            for row in filter(self._is_free, rows):
                if excess > 0:
                    victims.append(row)
                    excess -= row.record.size_bytes
            offset += len(rows) - len(victims)
            await self._drop_evicted(victims)

    def _is_free(self, row: Row) -> bool:
        key = row.record.key
        return key not in self._readers and not self.rows.has_gone(row) and self._may_go(key)

    async def _evict(self, num_bytes: int) -> bool:
        """Evicts at least `num_bytes`, lowest rank first; false, and nothing goes, when there are not so many."""
        self.rows.flush()
        victims: list[Row] = []
        offset = 0
        while num_bytes > 0 and (rows := self.rows.lowest(offset)):
            offset += len(rows)
            for row in filter(self._is_free, rows):
                if num_bytes > 0:
                    victims.append(row)
                    num_bytes -= row.record.size_bytes
        if num_bytes > 0:
            return False
        await self._drop_evicted(victims)
        return True

    async def _drop_evicted(self, rows: Sequence[Row]) -> None:
        for row in rows:
            key = row.record.key
            log.debug(
                "evicted from disk", tenant=key.tenant_id, chunk_id=key.chunk_id.hex(), replica=row.record.replica
            )
        self.rows.drop(rows)
        for row in rows:
            self.counters.evictions += 1
            self.counters.evicted_bytes += row.record.size_bytes
            chunk_id = row.record.key.chunk_id.hex()
            current_span().event("cache.evict", chunk_id=chunk_id, tier="disk", num_bytes=row.record.size_bytes)
        await self._remove_files([name_of(row) for row in rows])

    async def _write_file(self, name: FileName, size: int, pieces: Callable[[], Iterator[memoryview]]) -> bool:
        """Writes; where the file system is fuller than the budget says, once more after evicting as much."""
        for is_last in (False, True):
            started = time.monotonic()
            try:
                await self.in_thread(lambda: self.files.write(name, pieces()))
            except OSError as error:
                if is_last or error.errno not in (errno.ENOSPC, errno.EDQUOT) or not await self._evict(size):
                    raise
                continue
            self.counters.written_bytes += size
            self.counters.write_seconds += time.monotonic() - started
            return True
        return False

    async def _remove_files(self, names: Sequence[FileName]) -> None:
        def remove() -> None:
            for name in names:
                self.files.remove(name)

        try:
            if names:
                await self.in_thread(remove)
        except OSError as error:
            self.counters.write_errors += 1
            log.warning("files not deleted; the next start collects them", num_files=len(names), error=str(error))

    def _note_write_error(self, key: ObjectKey, error: OSError) -> None:
        self.counters.write_errors += 1
        self.healthy = False
        self._failed_at = time.monotonic()
        log.warning("object not written to disk", chunk_id=key.chunk_id.hex(), error=str(error))

    def check_invariants(self) -> None:
        """Asserts that rows, files and totals agree. For tests, while nothing is being written."""
        rows = {name_of(row): row.record.size_bytes for row in self.rows.walk()}
        files = {found.name: found.size_bytes for found in self.files.scan()}
        assert rows == files, (rows, files)
        self.rows.check_invariants()
        assert self._promised_bytes == 0
        assert not self._writing


def _close_late(opening: asyncio.Future[ObjectFile]) -> None:
    """For a file that was opened when nobody waited any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
