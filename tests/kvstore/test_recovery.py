"""However the last process ended, index and files agree before anything is served."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import HandClock, key_of, make_chunk
from tier_worlds import HALF_LIFE_S, World, open_world

from spolia_core.errors import InvalidRequest
from spolia_core.reuse import MissReason
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.disk_files import TENANT_FILE, DiskFiles
from spolia_kvstore.disk_rows import DiskRows
from spolia_kvstore.disk_tier import DiskTier
from spolia_kvstore.objects import Tier
from spolia_kvstore.recovery import INDEX_NAME, Recovered, open_folder

CHUNKS = [make_chunk(number) for number in range(1, 5)]
ONE, TWO, THREE, _ = CHUNKS


class Killed(BaseException):
    """The process ends here."""


def killed(*_: object) -> None:
    raise Killed


async def killed_at(folder: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, *, delete: bool) -> None:
    """One chunk is safe on disk; the process dies at this step of writing, or deleting, the second."""

    async def life() -> None:
        async with open_world(folder, is_killed=True) as world:
            await world.put(ONE, durable=True)
            if delete:
                await world.put(TWO, durable=True)
            monkeypatch.setattr(target, name, killed)
            await (world.store.delete([key_of(TWO)]) if delete else world.put(TWO, durable=True))

    with pytest.raises(Killed):
        await life()
    monkeypatch.undo()


async def everything_is_served_or_missing(world: World) -> None:
    for chunk, answer in zip(CHUNKS, await world.get(*CHUNKS), strict=True):
        assert answer in (MissReason.NOT_FOUND, (Tier.DISK, chunk.data))
    assert not list((world.disk.files.root / "tmp").iterdir())


@pytest.mark.parametrize(
    ("target", "name", "expected"),
    [
        pytest.param(os, "writev", Recovered(), id="before any byte"),
        pytest.param(os, "replace", Recovered(), id="before its name"),
        pytest.param(DiskRows, "add", Recovered(orphan_files=1), id="before its row"),
    ],
)
async def test_a_write_that_was_cut_short_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: object, name: str, expected: Recovered
) -> None:
    await killed_at(tmp_path, monkeypatch, target, name, delete=False)
    async with open_world(tmp_path) as world:
        assert world.recovered == expected
        assert world.where(ONE, TWO) == ["DISK", ""]
        await everything_is_served_or_missing(world)
        await world.put(TWO, durable=True)


async def test_files_that_were_being_written_are_deleted(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
    for name in ("7.safetensors", "8.tenant"):
        (tmp_path / "tmp" / name).write_bytes(TWO.data[:100])
    async with open_world(tmp_path) as world:
        assert world.recovered == Recovered(unfinished_files=2)
        await everything_is_served_or_missing(world)


async def test_a_write_that_ended_before_it_was_told_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await killed_at(tmp_path, monkeypatch, DiskTier, "sync", delete=False)
    async with open_world(tmp_path) as world:
        assert (world.recovered, world.where(ONE, TWO)) == (Recovered(), ["DISK", "DISK"])
        assert await world.get(TWO) == [(Tier.DISK, TWO.data)]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        pytest.param("drop", True, id="before its row went"),
        pytest.param("_remove_files", False, id="before its file went"),
        pytest.param("sync", False, id="before it was told"),
    ],
)
async def test_a_delete_that_was_cut_short_is_whole_or_did_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: bool
) -> None:
    await killed_at(tmp_path, monkeypatch, DiskRows if name == "drop" else DiskTier, name, delete=True)
    async with open_world(tmp_path) as world:
        assert world.recovered == Recovered(orphan_files=int(name == "_remove_files"))
        assert world.where(ONE, TWO) == ["DISK", "DISK" if left else ""]
        await everything_is_served_or_missing(world)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        pytest.param(Path.unlink, Recovered(lost_rows=1), id="gone"),
        pytest.param(lambda path: os.truncate(path, 100), Recovered(lost_rows=1, quarantined=1), id="short"),
        pytest.param(lambda path: path.write_bytes(TWO.data + b"x"), Recovered(lost_rows=1, quarantined=1), id="long"),
    ],
)
async def test_a_row_without_its_whole_file_is_dropped(
    tmp_path: Path, harm: Callable[[Path], object], expected: Recovered
) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, TWO, durable=True)
        path = world.file_of(TWO)
    harm(path)
    async with open_world(tmp_path) as world:
        assert (world.recovered, world.where(ONE, TWO)) == (expected, ["DISK", ""])
        assert len(world.disk.files.quarantined()) == expected.quarantined
        await everything_is_served_or_missing(world)
        await world.put(TWO, durable=True)


async def test_every_file_that_no_row_names_goes_however_many_on_a_shelf(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        folder = world.file_of(ONE).parent
    for stranger in ("a", "b.txt", "c.safetensors", f"{TWO.chunk_id.hex()}-f9.safetensors"):
        (folder / stranger).write_bytes(b"?")
    async with open_world(tmp_path) as world:
        assert world.recovered == Recovered(orphan_files=4)
        assert [path.name for path in folder.iterdir()] == [world.file_of(ONE).name]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "no database": lambda data: b"garbage" * 1000,
    "a page overwritten": lambda data: data[:8192] + b"\xff" * 4096 + data[12288:],
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_an_index_that_is_damaged_or_lost_is_made_again_from_the_files(tmp_path: Path, damage: str) -> None:
    clock = HandClock()
    async with open_world(tmp_path, clock=clock) as world:
        await world.put(ONE, TWO, THREE, durable=True)
        await world.put(ONE, tenant_id="ä other/..", durable=True)
        world.file_of(THREE).write_bytes(THREE.data[:-1] + b"?")
    index = tmp_path / INDEX_NAME
    index.write_bytes(DAMAGE[damage](index.read_bytes()))
    with captured_logs():
        for expected in (Recovered(quarantined=1, rebuilt_rows=3), Recovered()):
            async with open_world(tmp_path, clock=clock) as world:
                assert world.recovered == expected
                assert world.where(ONE, TWO, THREE) == ["DISK", "DISK", ""]
                assert world.where(ONE, tenant_id="ä other/..") == ["DISK"]
                assert world.disk.files.quarantined() == [len(THREE.data)]
                await everything_is_served_or_missing(world)
    assert (tmp_path / f"{INDEX_NAME}.damaged").exists() == (damage != "empty"), "people may look at it"


async def test_an_index_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        (before,) = world.disk.rows.find([key_of(ONE)]).values()
    (tmp_path / INDEX_NAME).unlink()
    async with open_world(tmp_path) as world:
        assert world.recovered == Recovered(rebuilt_rows=1)
        (after,) = world.disk.rows.find([key_of(ONE)]).values()
        assert (after.frame_digests, after.file_id) == (before.frame_digests, before.file_id)
        assert (after.record.digest, after.record.fingerprint) == (before.record.digest, before.record.fingerprint)
        assert await world.get(ONE) == [(Tier.DISK, ONE.data)]


async def test_an_index_that_was_being_made_again_when_the_process_died_loses_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, TWO, THREE, durable=True)
    (tmp_path / INDEX_NAME).unlink()
    put_many = Catalog.put_many

    def put_some_then_die(catalog: Catalog, rows: list[Row]) -> None:
        put_many(catalog, rows[:2])
        catalog.close()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "put_many", put_some_then_die)
        with pytest.raises(Killed):
            open_folder(tmp_path, HALF_LIFE_S)
    async with open_world(tmp_path) as world:
        assert world.recovered == Recovered(rebuilt_rows=3)
        assert world.where(ONE, TWO, THREE) == ["DISK"] * 3


async def test_a_file_under_another_chunks_name_is_not_listed_as_that_chunk(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        path = world.file_of(ONE)
    path.rename(path.with_name(path.name.replace(ONE.chunk_id.hex(), TWO.chunk_id.hex())))
    (tmp_path / INDEX_NAME).unlink()
    with captured_logs():
        async with open_world(tmp_path) as world:
            assert world.recovered == Recovered(quarantined=1)
            assert world.where(ONE, TWO) == ["", ""]


async def test_rows_of_a_tenant_whose_name_was_lost_are_still_served(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put(ONE, durable=True)
        named = world.file_of(ONE).parent.parent / TENANT_FILE
    named.unlink()
    async with open_world(tmp_path) as world:
        assert await world.get(ONE) == [(Tier.DISK, ONE.data)]
        await world.put(TWO, durable=True)


def test_a_folder_is_one_stores_alone(tmp_path: Path) -> None:
    first = open_folder(tmp_path, HALF_LIFE_S)
    (tmp_path / "tmp" / "1.safetensors").write_bytes(b"of the first")
    with pytest.raises(InvalidRequest, match="locked"):
        open_folder(tmp_path, HALF_LIFE_S)
    assert list((tmp_path / "tmp").iterdir()), "the second touched nothing"
    first.catalog.close()


def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest) as caught:
        open_folder(tmp_path / "file", HALF_LIFE_S)
    assert (caught.value.field, caught.value.actual) == ("data_dir", str(tmp_path / "file"))


def test_an_index_of_another_release_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    DiskFiles(tmp_path)
    database = sqlite3.connect(tmp_path / INDEX_NAME)
    database.execute("PRAGMA user_version = 99")
    database.close()
    before = (tmp_path / INDEX_NAME).read_bytes()
    with pytest.raises(InvalidRequest, match="schema 99"):
        open_folder(tmp_path, HALF_LIFE_S)
    assert (tmp_path / INDEX_NAME).read_bytes() == before
