"""A mapped file gives its bytes or an error, never a dead process."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from spolia_kvstore import mapped_file
from spolia_kvstore.mapped_file import MappedFile

PAGE = mmap.PAGESIZE
DATA = os.urandom(5 * PAGE + 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(DATA)
    return made


@pytest.fixture(params=["populate", "read"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel that knows MADV_POPULATE_READ, and one that does not."""
    if request.param == "read":

        def madvise(*_: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

        monkeypatch.setattr(mapped_file, "_libc", SimpleNamespace(madvise=madvise))
    return str(request.param)


@pytest.mark.parametrize(
    ("start", "end"), [(0, len(DATA)), (0, 1), (PAGE - 1, PAGE + 1), (3 * PAGE, 4 * PAGE), (7, 7), (5 * PAGE, 9 * PAGE)]
)
def test_any_range_reads_as_it_was_written(path: Path, kernel: str, start: int, end: int) -> None:
    file = MappedFile(path, len(DATA))
    assert file.read(start, end) == DATA[start:end]
    file.close()


def test_a_file_truncated_under_its_mapping_is_an_error(path: Path, kernel: str) -> None:
    file = MappedFile(path, len(DATA))
    os.truncate(path, 2 * PAGE)
    assert file.read(0, 2 * PAGE) == DATA[: 2 * PAGE]
    for start, end in ((2 * PAGE, 3 * PAGE), (PAGE, len(DATA)), (len(DATA) - 1, len(DATA))):
        with pytest.raises(OSError, match=f"{path}"):
            file.read(start, end)
    file.close()


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
def test_a_file_of_another_length_is_not_opened(path: Path, size: int) -> None:
    with pytest.raises(OSError, match=f"has {len(DATA)} bytes"):
        MappedFile(path, size)


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(OSError, match=name):
            MappedFile(tmp_path / name, 0)


def test_a_mapping_outlives_the_files_name_and_reads_no_bytes_of_its_successor(path: Path, kernel: str) -> None:
    file = MappedFile(path, len(DATA))
    path.unlink()
    path.write_bytes(bytes(len(DATA)))
    assert file.read(0, len(DATA)) == DATA
    file.close()


def test_nothing_stays_open_after_close_nor_after_a_refusal(path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    file = MappedFile(path, len(DATA))
    assert len(os.listdir("/proc/self/fd")) > len(before)
    file.close()
    file.close()
    with pytest.raises(OSError, match="bytes"):
        MappedFile(path, 1)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_disk_that_fails_is_an_error_that_says_which_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MappedFile(path, len(DATA))

    def madvise(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(mapped_file, "_libc", SimpleNamespace(madvise=madvise))
    with pytest.raises(OSError, match=f"bytes {PAGE} … {2 * PAGE} cannot be read") as caught:
        file.read(PAGE + 5, 2 * PAGE)
    assert caught.value.errno == errno.EIO
    file.close()
