"""Opens what the last process left behind, however it ended: index and files agree before anything is served.

A file that no row names was being written, or deleted, when the process died: it goes. A row whose file is gone goes
too, and one whose file has another length has its file quarantined. Bytes are checked when they are read.

An index that is damaged is set aside and made again from the files, which say what they are; a store must not be kept
from starting by a cache that is lost.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from spolia_core.errors import InvalidRequest, SpoliaError
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.catalog_file import LOG_BYTES, CatalogUnusable
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_files import DiskFiles, FoundFile
from spolia_kvstore.disk_rows import name_of
from spolia_kvstore.file_record import record_of_file
from spolia_kvstore.objects import Tier
from spolia_kvstore.usage import DEFAULT_SECONDS_PER_TOKEN, Usage, log_cost
from spolia_node.logs import get_log

INDEX_NAME = "index.db"
SPACE_BYTES = 4 << 20
"""What must be free for the index to open."""

REBUILT_AT_ONCE = 500

log = get_log(__name__)


@dataclass(slots=True)
class Recovered:
    """What was found at start."""

    unfinished_files: int = 0
    orphan_files: int = 0
    lost_rows: int = 0
    quarantined: int = 0
    rebuilt_rows: int = 0


@dataclass(frozen=True, slots=True)
class DataFolder:
    """A folder that is open: its files, and the index over them, which no other process may open meanwhile."""

    files: DiskFiles
    catalog: Catalog
    recovered: Recovered


def open_folder(root: Path, half_life_s: float) -> DataFolder:
    """Opens, makes or repairs a data folder. Raises `InvalidRequest` where it cannot be used, for example since another
    store uses it."""
    try:
        files = DiskFiles(root)
    except OSError as error:
        raise InvalidRequest(f"data_dir {root} cannot be used: {error}", field="data_dir", actual=str(root)) from error
    recovered = Recovered()
    try:
        catalog = _open_and_repair(files, root / INDEX_NAME, half_life_s, recovered)
    except OSError as error:
        raise InvalidRequest(f"data_dir {root} cannot be used: {error}", field="data_dir", actual=str(root)) from error
    log.info("data folder open", **{name: getattr(recovered, name) for name in Recovered.__slots__})
    return DataFolder(files, catalog, recovered)


def _open_and_repair(files: DiskFiles, path: Path, half_life_s: float, recovered: Recovered) -> Catalog:
    """Tries again with what stands in the way gone: some objects of a disk that is full, an index that is damaged."""
    for is_last in (False, False, True):
        try:
            return _opened(files, path, half_life_s, recovered)
        except (sqlite3.Error, CatalogUnusable, ValueError, TypeError) as error:
            is_full = _may_be_full(error) and _free_bytes(files) < SPACE_BYTES
            may_be_repaired = is_full or _may_be_full(error) or not isinstance(error, CatalogUnusable)
            if is_last or not may_be_repaired:
                raise InvalidRequest(
                    f"data_dir {files.root} cannot be used: {error}", field="data_dir", actual=str(files.root)
                ) from error
            what = "space is made" if is_full else "it is set aside and made again from the files"
            log.error("the index cannot be opened", error=str(error), repair=what)
            (_make_space if is_full else _set_aside)(files, path)
    raise AssertionError("the last try returns or raises")


def _opened(files: DiskFiles, path: Path, half_life_s: float, recovered: Recovered) -> Catalog:
    catalog = Catalog(str(path), half_life_s)
    try:
        catalog.check()
        recovered.lost_rows += catalog.drop_damaged()
        recovered.unfinished_files += files.empty_tmp()  # now that no other store can be writing there
        if not catalog.is_whole:
            _rebuild(files, catalog, recovered)
            catalog.mark_whole()
        _reconcile(files, catalog, recovered)
    except BaseException:
        catalog.close()
        raise
    return catalog


def _may_be_full(error: BaseException) -> bool:
    """Where no room is left, SQLite says so, or that it could not write its shared memory."""
    cause = error.__cause__ if isinstance(error, CatalogUnusable) else error
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT)
    code = getattr(cause, "sqlite_errorcode", 0) or 0
    return code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def _free_bytes(files: DiskFiles) -> int:
    found = os.statvfs(files.root)
    return found.f_bavail * found.f_frsize


def _make_space(files: DiskFiles, path: Path) -> None:
    """Enough for the index to open: what was set aside goes first, then some of the objects, which are a cache."""
    for damaged in path.parent.glob(f"{path.name}.damaged*"):
        damaged.unlink(missing_ok=True)
    files.empty_quarantine()
    files.empty_tmp()
    for found in files.scan():
        if _free_bytes(files) >= SPACE_BYTES:
            break
        found.path.unlink(missing_ok=True)


def _reconcile(files: DiskFiles, catalog: Catalog, recovered: Recovered) -> None:
    """Shelf by shelf, so that a store of millions needs no memory for it."""
    for tenant_id in {*files.tenants(), *catalog.totals_by_tenant(Tier.DISK)}:
        for first_byte in sorted(files.shelves(tenant_id) | catalog.first_bytes(Tier.DISK, tenant_id)):
            _reconcile_shelf(files, catalog, tenant_id, first_byte, recovered)


def _reconcile_shelf(files: DiskFiles, catalog: Catalog, tenant_id: str, first_byte: int, recovered: Recovered) -> None:
    found = {each.path: each for each in files.shelf(tenant_id, first_byte)}
    lost = []
    for row in catalog.rows(Tier.DISK, tenant_id, bytes([first_byte])):
        file = found.pop(files.path_of(name_of(row)), None)
        if file is not None and file.size_bytes == row.record.size_bytes:
            continue
        lost.append(row.record.key)
        if file is not None:
            files.quarantine(name_of(row))
            recovered.quarantined += 1
    catalog.remove(lost, Tier.DISK)
    recovered.lost_rows += len(lost)
    for orphan in found.values():
        orphan.path.unlink(missing_ok=True)
        recovered.orphan_files += 1


def _rebuild(files: DiskFiles, catalog: Catalog, recovered: Recovered) -> None:
    """In batches, whose log is moved into the database as it grows: the disk may have little room."""
    rows: list[Row] = []
    for found in files.scan():
        row = _row_of(found)
        if row is not None:
            rows.append(row)
        elif found.name is not None:
            files.quarantine(found.name)
            recovered.quarantined += 1
        if len(rows) == REBUILT_AT_ONCE:
            _add(catalog, rows, recovered)
    _add(catalog, rows, recovered)


def _add(catalog: Catalog, rows: list[Row], recovered: Recovered) -> None:
    catalog.put_many(rows)
    recovered.rebuilt_rows += len(rows)
    rows.clear()
    if catalog.log_bytes > LOG_BYTES:
        catalog.checkpoint()


def _row_of(found: FoundFile) -> Row | None:
    """The row for a file, from what it says itself; None when it is not whole."""
    if found.name is None:
        return None
    try:
        record, frame_digests = record_of_file(found.path, found.name.key)
        written_at = found.path.stat().st_mtime
    except (OSError, SpoliaError) as error:
        log.warning("file left out of the new index", path=str(found.path), error=str(error))
        return None
    cost = log_cost(0.0, record.num_tokens, record.size_bytes, DEFAULT_SECONDS_PER_TOKEN)
    return Row(record, Tier.DISK, Usage(written_at, written_at, log_cost=cost), frame_digests, found.name.file_id)


def _set_aside(files: DiskFiles, path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        damaged = path.with_name(path.name + suffix)
        if damaged.exists():
            os.replace(damaged, path.with_name(f"{path.name}.damaged{suffix}"))
