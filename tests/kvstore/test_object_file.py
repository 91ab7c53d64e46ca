"""An open file gives its bytes or an error, never fewer and never a dead process."""

from __future__ import annotations

import mmap
import os
import tracemalloc
from pathlib import Path

import pytest
from kvstore_worlds import key_of, make_big_chunk
from open_files import open_files

from spolia_core.digests import FRAME_BYTES, frames
from spolia_kvstore import object_file
from spolia_kvstore.file_record import record_of_file
from spolia_kvstore.object_file import ObjectFile

PAGE = mmap.PAGESIZE
DATA = os.urandom(5 * PAGE + 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(DATA)
    return made


@pytest.mark.parametrize(
    ("start", "end"), [(0, len(DATA)), (0, 1), (PAGE - 1, PAGE + 1), (3 * PAGE, 4 * PAGE), (7, 7), (5 * PAGE, 9 * PAGE)]
)
def test_any_range_reads_as_it_was_written(path: Path, start: int, end: int) -> None:
    file = ObjectFile(path, len(DATA))
    assert file.read(start, end) == DATA[start:end]
    file.close()


def test_a_file_truncated_while_it_is_open_is_an_error(path: Path) -> None:
    file = ObjectFile(path, len(DATA))
    os.truncate(path, 2 * PAGE)
    assert file.read(0, 2 * PAGE) == DATA[: 2 * PAGE]
    for start, end in ((2 * PAGE, 3 * PAGE), (PAGE, len(DATA)), (len(DATA) - 1, len(DATA))):
        with pytest.raises(OSError, match=f"{path}"):
            file.read(start, end)
    file.close()


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
def test_a_file_of_another_length_is_not_opened(path: Path, size: int) -> None:
    with pytest.raises(OSError, match=f"has {len(DATA)} bytes"):
        ObjectFile(path, size)


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(OSError, match=name):
            ObjectFile(tmp_path / name, 0)


def test_an_open_file_outlives_its_name_and_reads_no_bytes_of_its_successor(path: Path) -> None:
    file = ObjectFile(path, len(DATA))
    path.unlink()
    path.write_bytes(bytes(len(DATA)))
    assert file.read(0, len(DATA)) == DATA
    file.close()


def test_nothing_stays_open_after_close_nor_after_a_refusal(path: Path) -> None:
    file = ObjectFile(path, len(DATA))
    assert str(path) in open_files()
    file.close()
    file.close()
    with pytest.raises(OSError, match="bytes"):
        ObjectFile(path, 1)
    assert str(path) not in open_files()


def test_a_read_that_ends_early_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ObjectFile(path, len(DATA))
    pread = os.pread
    monkeypatch.setattr(object_file.os, "pread", lambda fd, size, offset: pread(fd, min(size, 100), offset))
    assert file.read(7, 1007) == DATA[7:1007]
    file.close()


def test_a_file_is_listed_again_without_ever_being_in_memory_as_a_whole(tmp_path: Path) -> None:
    chunk = make_big_chunk(1)
    path = tmp_path / "some.safetensors"
    path.write_bytes(chunk.data)
    tracemalloc.start()
    try:
        record, frame_digests = record_of_file(path, key_of(chunk))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (record.digest, record.size_bytes) == (chunk.info.digest, len(chunk.data))
    assert frame_digests == tuple(piece_digest for _, _, piece_digest in frames(chunk.data))
    assert peak_bytes < 4 * FRAME_BYTES < len(chunk.data)
