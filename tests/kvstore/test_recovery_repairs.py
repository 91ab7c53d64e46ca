"""A start where the index cannot be opened: what stands in the way goes, and the store serves what is left."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import key_of, make_chunk
from tier_worlds import open_world

from spolia_core.errors import InvalidRequest
from spolia_kvstore import recovery
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.catalog_file import CatalogUnusable
from spolia_kvstore.recovery import open_folder

CHUNKS = [make_chunk(number) for number in range(4)]


async def fill(folder: Path) -> None:
    async with open_world(folder) as world:
        await world.put_on_disk_only(*CHUNKS)


def raising_first(num_times: int, code: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A catalog whose first openings fail with an error of SQLite."""
    tries: list[int] = []

    class Failing(Catalog):
        def __init__(self, path: str, half_life_s: float) -> None:
            tries.append(code)
            if len(tries) <= num_times:
                cause = sqlite3.OperationalError("it failed")
                cause.sqlite_errorcode = code
                raise CatalogUnusable("index cannot be used: it failed") from cause
            super().__init__(path, half_life_s)

    monkeypatch.setattr(recovery, "Catalog", Failing)
    return tries


async def test_on_a_disk_too_full_for_the_index_objects_go_until_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path)
    (tmp_path / "index.db.damaged-wal").write_bytes(b"of another day")
    frees = iter([0, 0, recovery.SPACE_BYTES])  # when it is asked, before one object goes, and after
    monkeypatch.setattr(recovery, "_free_bytes", lambda files: next(frees))
    tries = raising_first(1, sqlite3.SQLITE_FULL, monkeypatch)
    with captured_logs():
        opened = open_folder(tmp_path, 900.0)
    assert len(tries) == 2
    assert opened.recovered.lost_rows == 1, "as much as was needed went, and no more"
    assert not (tmp_path / "index.db.damaged-wal").exists(), "and what was set aside went first"
    opened.catalog.close()


async def test_an_index_that_cannot_be_read_on_a_disk_with_room_is_made_again_and_no_object_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path)
    tries = raising_first(1, sqlite3.SQLITE_IOERR | (10 << 8), monkeypatch)
    with captured_logs():
        opened = open_folder(tmp_path, 900.0)
    assert len(tries) == 2
    assert opened.recovered.rebuilt_rows == len(CHUNKS)
    assert (tmp_path / "index.db.damaged").exists()
    opened.catalog.close()


async def test_a_start_that_nothing_helps_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(tmp_path)
    tries = raising_first(9, sqlite3.SQLITE_FULL, monkeypatch)
    with captured_logs(), pytest.raises(InvalidRequest, match=r"data_dir .* cannot be used"):
        open_folder(tmp_path, 900.0)
    assert len(tries) == 3


@pytest.mark.parametrize(
    "change",
    [
        "tier = 34",
        "used_at = 'soon'",
        "size_bytes = x'00'",
        "frame_digests = 7",
        "tenant_id = x'ff'",
        "rank = 'low'",
        "tenant_id = ''",
        "chunk_id = x'00'",
        "frame_digests = x''",
    ],
)
async def test_a_row_that_no_release_has_written_costs_its_object_and_nothing_else(tmp_path: Path, change: str) -> None:
    await fill(tmp_path)
    path = tmp_path / "index.db"
    with sqlite3.connect(path) as database:
        database.execute(f"UPDATE objects SET {change} WHERE chunk_id = ?", (CHUNKS[0].chunk_id,))
    database.close()
    with captured_logs():
        async with open_world(tmp_path) as world:
            assert set(world.disk.rows.find([key_of(chunk) for chunk in CHUNKS])) == {
                key_of(chunk) for chunk in CHUNKS[1:]
            }
            assert (world.recovered.lost_rows, world.recovered.orphan_files) == (1, 1)
            assert [data for _, data in await world.get(*CHUNKS[1:])] == [chunk.data for chunk in CHUNKS[1:]]


@pytest.mark.parametrize(
    "damage",
    [
        "INSERT INTO claims VALUES ('t', x'00', 'o', 'abc')",
        "INSERT INTO pins VALUES ('t', x'00', 'o', 'abc')",
        "INSERT INTO members VALUES ('node', 'one', x'00')",
        "INSERT INTO member_leases VALUES ('node', 'zz')",
    ],
)
async def test_a_damaged_lease_does_not_keep_a_store_from_starting(tmp_path: Path, damage: str) -> None:
    await fill(tmp_path)
    with sqlite3.connect(tmp_path / "index.db") as database:
        database.execute(damage)
    database.close()
    async with open_world(tmp_path) as world:
        assert world.where(*CHUNKS) == ["DISK"] * len(CHUNKS)
        assert world.store.claims.num_live() == world.store.pins.num_live == 0


async def test_an_index_is_made_again_without_a_log_that_grows_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(tmp_path)
    (tmp_path / "index.db").unlink()
    checkpoints: list[int] = []
    checkpoint = Catalog.checkpoint
    monkeypatch.setattr(Catalog, "checkpoint", lambda catalog: (checkpoints.append(1), checkpoint(catalog))[1])
    monkeypatch.setattr(recovery, "LOG_BYTES", 1)
    monkeypatch.setattr(recovery, "REBUILT_AT_ONCE", 2)
    opened = open_folder(tmp_path, 900.0)
    assert (opened.recovered.rebuilt_rows, len(checkpoints)) == (len(CHUNKS), 3)
    opened.catalog.close()
