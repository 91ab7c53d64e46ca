"""The disk tier: what a row names is there, and a disk that is full or fails costs reuse, no more."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from kvstore_worlds import eventually, make_record

from spolia_kvstore.catalog import Catalog, Totals
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_files import DiskFiles
from spolia_kvstore.disk_rows import name_of
from spolia_kvstore.disk_tier import RETRY_AFTER_S, DiskTier
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.usage import Usage

HALF_LIFE_S = 900.0
BUDGET = 100


def disk_failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def index_failing(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


class Disk:
    """A tier of 100 bytes, and what it told."""

    def __init__(self, root: Path) -> None:
        self.pinned: set[ObjectKey] = set()
        self.gone: list[int] = []
        self.listed: list[int] = []
        self.files = DiskFiles(root)
        self.catalog = Catalog(half_life_s=HALF_LIFE_S)
        self.tier = DiskTier(
            self.files,
            self.catalog,
            BUDGET,
            HALF_LIFE_S,
            may_go=lambda key: key not in self.pinned,
            on_gone=lambda row: self.gone.append(number_of(row)),
        )

    async def write(self, number: int, size: int = 25, *, used_at: float = 0.0, file_id: str = "f1") -> bool:
        row = a_row(number, size, used_at, file_id)
        pieces = [memoryview(bytes([number]) * size)]
        return await self.tier.write(row, lambda: iter(pieces), lambda: True, lambda: self.listed.append(number))

    def numbers(self) -> list[int]:
        return [number_of(row) for row in self.tier.rows.walk()]

    async def read(self, number: int) -> bytes:
        row = self.row(number)
        file = await self.tier.open(row)
        try:
            return file.read(0, row.record.size_bytes)
        finally:
            file.close()

    def row(self, number: int) -> Row:
        (row,) = self.tier.rows.find([key(number)]).values()
        return row


def key(number: int) -> ObjectKey:
    return make_record(number, 1).key


def number_of(row: Row) -> int:
    return int.from_bytes(row.record.key.chunk_id, "big")


def a_row(number: int, size: int = 25, used_at: float = 0.0, file_id: str = "f1") -> Row:
    return Row(make_record(number, size), Tier.DISK, Usage(used_at, used_at), (b"d" * 16,), file_id)


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.tier.check_invariants()
    await made.tier.close()
    made.catalog.close()


async def test_what_was_written_is_found_and_read_and_told_at_that_moment(disk: Disk) -> None:
    assert await disk.write(1)
    assert (disk.listed, len(disk.tier), disk.tier.used_bytes) == ([1], 1, 25)
    assert await disk.read(1) == b"\x01" * 25
    assert disk.tier.counters.written_bytes == 25
    assert await disk.tier.sync()


async def test_the_lowest_rank_goes_first_but_never_what_is_pinned_or_read(disk: Disk) -> None:
    for number in range(1, 5):
        await disk.write(number, used_at=100.0 * number)
    disk.tier.rows.use(disk.row(1), 1000.0, is_hit=True)
    disk.pinned.add(key(2))
    disk.tier.hold(key(3))
    assert await disk.write(5, used_at=1000.0)
    assert (disk.numbers(), disk.gone) == ([1, 2, 3, 5], [4])
    assert (disk.tier.counters.evictions, disk.tier.counters.evicted_bytes) == (1, 25)
    disk.tier.release(key(3))
    assert await disk.write(6, used_at=1000.0)
    assert disk.gone == [4, 3]


async def test_an_object_for_which_there_can_be_no_room_evicts_nothing(disk: Disk) -> None:
    for number in range(1, 5):
        await disk.write(number)
    disk.pinned |= {key(1), key(2)}
    assert not await disk.write(8, size=BUDGET + 1)
    assert not await disk.write(9, size=51)
    assert (disk.numbers(), disk.gone) == ([1, 2, 3, 4], [])
    assert await disk.write(9, size=50)
    assert disk.numbers() == [1, 2, 9]


async def test_writes_at_once_do_not_evict_for_each_others_room(disk: Disk) -> None:
    for number in range(1, 5):
        await disk.write(number)
    assert await asyncio.gather(*(disk.write(number, used_at=5.0) for number in (5, 6))) == [True, True]
    assert len(disk.gone) == 2
    assert disk.tier.used_bytes == BUDGET


async def test_a_low_rank_is_admitted_only_where_there_is_room(disk: Disk) -> None:
    assert disk.tier.admission()(BUDGET, -100.0)
    for number in range(1, 5):
        await disk.write(number, used_at=900.0)
    assert not disk.tier.admission()(1, 0.5)
    assert disk.tier.admission()(1, 1.5)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
async def test_a_write_that_fails_is_false_and_counted_and_no_outage(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await disk.write(1)
    with monkeypatch.context() as patched:
        patched.setattr(disk.files, "write", disk_failing(number))
        disk.pinned.add(key(1))
        assert not await disk.write(2)
        assert (disk.tier.healthy, disk.tier.takes_writes, disk.tier.counters.write_errors) == (False, False, 1)
    assert await disk.read(1) == b"\x01" * 25
    assert (disk.listed, disk.numbers()) == ([1], [1])
    assert await disk.write(3)
    assert disk.tier.healthy


async def test_writes_nobody_waits_for_are_tried_again_after_a_while(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.files, "write", disk_failing(errno.EIO))
    await disk.write(1)
    assert not disk.tier.takes_writes
    disk.tier._failed_at -= RETRY_AFTER_S
    assert disk.tier.takes_writes


async def test_a_file_system_fuller_than_the_budget_says_takes_it_after_evicting_as_much(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 4):
        await disk.write(number, used_at=float(number))
    write, attempts = disk.files.write, []

    def full_once(*arguments: object) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            disk_failing(errno.ENOSPC)()
        write(*arguments)  # type: ignore[arg-type]  # whatever `write` takes

    monkeypatch.setattr(disk.files, "write", full_once)
    assert await disk.write(4)
    assert (disk.gone, disk.numbers(), disk.tier.healthy) == ([1], [2, 3, 4], True)


async def test_an_index_that_takes_no_row_leaves_no_file(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(disk.catalog, "put", index_failing)
        assert not await disk.write(1)
    assert (list(disk.files.scan()), disk.tier.rows.errors) == ([], 1)


async def test_an_index_that_cannot_be_read_is_a_miss(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    await disk.write(1)
    with monkeypatch.context() as patched:
        for method in ("lookup", "lowest", "lowest_of_tenant"):
            patched.setattr(disk.catalog, method, index_failing)
        assert disk.tier.rows.find([key(1)]) == {}
        assert list(disk.tier.rows.lowest_of_tenant("tenant")) == []
        assert not await disk.write(2, size=BUDGET), "nothing is known that could go"
    assert disk.tier.rows.errors > 0
    assert await disk.read(1) == b"\x01" * 25


async def test_a_row_that_cannot_be_removed_counts_as_gone_and_goes_later(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await disk.write(1)
    with monkeypatch.context() as patched:
        patched.setattr(disk.catalog, "remove", index_failing)
        assert [number_of(row) for row in await disk.tier.remove([key(1)])] == [1]
        disk.tier.rows.flush()
        assert (disk.numbers(), disk.tier.rows.find([key(1)]), disk.tier.used_bytes) == ([], {}, 0)
        assert await disk.write(1, file_id="f2"), "the same object can be stored again"
        assert disk.numbers() == [1]
    disk.tier.rows.flush()
    assert disk.row(1).file_id == "f2"
    await disk.write(3)
    monkeypatch.setattr(disk.catalog, "remove", index_failing)
    await disk.tier.remove([key(3)])
    monkeypatch.undo()
    disk.tier.rows.flush()
    assert disk.catalog.totals(Tier.DISK) == Totals(1, 25)


async def test_what_is_deleted_while_it_is_written_leaves_nothing(disk: Disk) -> None:
    row = a_row(1)
    pieces = [memoryview(bytes(25))]
    assert not await disk.tier.write(row, lambda: iter(pieces), lambda: False, lambda: disk.listed.append(1))
    assert (list(disk.files.scan()), disk.listed, len(disk.tier)) == ([], [], 0)


async def test_a_new_file_replaces_the_old_one_of_its_object(disk: Disk) -> None:
    await disk.write(1, size=20)
    await disk.write(1, size=30, file_id="f2")
    assert (len(disk.tier), disk.tier.used_bytes, disk.row(1).file_id) == (1, 30, "f2")
    assert [found.name for found in disk.files.scan()] == [name_of(disk.row(1))]


async def test_a_deleted_object_is_gone_at_once_and_for_good_and_its_readers_finish(disk: Disk) -> None:
    await disk.write(1)
    file = await disk.tier.open(disk.row(1))
    assert [number_of(row) for row in await disk.tier.remove([key(1), key(2)])] == [1]
    assert (disk.gone, disk.numbers(), list(disk.files.scan())) == ([1], [], [])
    assert file.read(0, 25) == b"\x01" * 25
    file.close()
    assert await disk.tier.remove([key(1)]) == []


@pytest.mark.parametrize("damage", ["missing", "short"])
async def test_a_file_that_is_not_what_was_written_is_taken_out_of_service(disk: Disk, damage: str) -> None:
    await disk.write(1)
    path = disk.files.path_of(name_of(disk.row(1)))
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 24)
    row = disk.row(1)
    for _ in range(2):
        with pytest.raises(OSError, match=path.name):
            await disk.tier.open(row)
    assert (disk.gone, disk.numbers(), disk.tier.used_bytes) == ([1], [], 0)
    assert (disk.tier.counters.read_errors, disk.tier.counters.quarantined) == (1, 1), "once"
    assert disk.files.quarantined() == [24] * (damage == "short")


async def test_an_object_deleted_before_it_is_opened_is_no_error_of_the_disk(disk: Disk) -> None:
    await disk.write(1)
    row = disk.row(1)
    await disk.tier.remove([key(1)])
    with pytest.raises(FileNotFoundError):
        await disk.tier.open(row)
    assert (disk.tier.counters.read_errors, disk.tier.counters.quarantined) == (0, 0)


async def test_taking_out_an_old_file_leaves_its_successor_in_service(disk: Disk) -> None:
    await disk.write(1)
    old = disk.row(1)
    await disk.write(1, file_id="f2")
    await disk.tier.take_out(old, "damaged")
    assert (disk.row(1).file_id, disk.gone, disk.tier.counters.quarantined) == ("f2", [], 0)


async def test_uses_are_seen_at_once_and_written_at_the_flush(disk: Disk) -> None:
    await disk.write(1)
    used = disk.tier.rows.use(disk.row(1), 50.0, is_hit=True)
    assert (disk.row(1).usage, next(disk.tier.rows.walk()).usage) == (used, used)
    assert next(disk.catalog.rows(Tier.DISK)).usage != used
    disk.tier.rows.flush()
    assert next(disk.catalog.rows(Tier.DISK)).usage == used


async def test_uses_that_the_index_refused_are_written_at_a_later_flush(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await disk.write(1)
    used = disk.tier.rows.use(disk.row(1), 50.0, is_hit=True)
    with monkeypatch.context() as patched:
        patched.setattr(disk.catalog, "set_usage", index_failing)
        disk.tier.rows.flush()
    assert (disk.tier.rows.errors, disk.row(1).usage) == (1, used)
    disk.tier.rows.flush()
    assert next(disk.catalog.rows(Tier.DISK)).usage == used


async def test_a_cancelled_caller_waits_for_its_thread(disk: Disk) -> None:
    started, may_end = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        assert may_end.wait(20)

    task = asyncio.create_task(disk.tier.in_thread(work))
    await eventually(started.is_set)
    task.cancel()
    _, pending = await asyncio.wait([task], timeout=0.05)
    assert pending == {task}
    may_end.set()
    await asyncio.wait([task], timeout=20)
    assert task.cancelled()
