"""Reads from disk that fail: what that says of the object, and what it says of the process alone."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from captured_logs import captured_logs
from kvstore_worlds import make_chunk
from tier_worlds import open_world

from spolia_core.reuse import MissReason
from spolia_kvstore import disk_tier
from spolia_kvstore.housekeeping import ObjectState
from spolia_kvstore.object_file import ObjectFile
from spolia_kvstore.objects import Tier

CHUNK = make_chunk(1)


def failing(number: int) -> type[ObjectFile]:
    class Failing(ObjectFile):
        def __init__(self, path: Path, size: int) -> None:
            raise OSError(number, "it failed", str(path))

    return Failing


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES])
async def test_a_process_that_cannot_open_files_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(CHUNK)
        with monkeypatch.context() as patch, captured_logs():
            patch.setattr(disk_tier, "ObjectFile", failing(number))
            assert await world.get(CHUNK) == [MissReason.UNREADABLE]
        assert (world.disk.counters.read_errors, world.disk.counters.quarantined) == (1, 0)
        assert await world.get(CHUNK) == [(Tier.DISK, CHUNK.data)]


async def test_a_disk_that_cannot_read_a_file_loses_that_object_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(CHUNK, make_chunk(2))
        with monkeypatch.context() as patch, captured_logs() as lines:
            patch.setattr(disk_tier, "ObjectFile", failing(errno.EIO))
            assert await world.get(CHUNK) == [MissReason.UNREADABLE]
        assert (world.disk.counters.read_errors, world.disk.counters.quarantined) == (1, 1)
        assert CHUNK.chunk_id.hex() in {line.get("chunk_id") for line in lines}
        assert await world.get(CHUNK, make_chunk(2)) == [MissReason.NOT_FOUND, (Tier.DISK, make_chunk(2).data)]


async def test_a_kind_that_this_release_does_not_know_is_listed_and_never_served(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.put_on_disk_only(CHUNK)
        world.catalog.db.execute("UPDATE objects SET kind = 99")
        assert [item.state for item in world.admin.list()] == [ObjectState.UNKNOWN_FORMAT]
        assert await world.get(CHUNK) == [MissReason.FORMAT_VERSION]
