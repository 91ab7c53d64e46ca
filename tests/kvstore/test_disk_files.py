"""Files of the disk tier: whole under their name or not there at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from kvstore_worlds import TENANT, make_record

from spolia_kvstore import disk_files
from spolia_kvstore.disk_files import MAX_QUARANTINED, TENANT_FILE, DiskFiles, FileName

ODD_TENANTS = [TENANT, "../../etc", "a/b", ".", "ä€😀", " ", "x" * 256, "a\nb"]


def a_name(number: int = 1, file_id: str = "f1", tenant_id: str = TENANT) -> FileName:
    return FileName(make_record(number, 1, tenant_id).key, file_id)


def write(files: DiskFiles, name: FileName, data: bytes = b"data") -> None:
    files.write(name, [memoryview(data)])


def everything(root: Path) -> list[str]:
    """Files under the root, tenant files left out."""
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.name != TENANT_FILE)


@pytest.fixture
def files(tmp_path: Path) -> DiskFiles:
    return DiskFiles(tmp_path)


def test_what_was_written_is_there_whole(files: DiskFiles, tmp_path: Path) -> None:
    pieces = [os.urandom(1 + number % 7) for number in range(1300)]  # more than one call takes
    files.write(a_name(), [memoryview(piece) for piece in pieces])
    assert files.path_of(a_name()).read_bytes() == b"".join(pieces)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_pieces_are_written_in_full_where_the_kernel_takes_less(
    files: DiskFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev: Callable[[int, list[memoryview]], int] = os.writev
    monkeypatch.setattr(os, "writev", lambda file, pieces: writev(file, [pieces[0][:3]]))
    files.write(a_name(), [memoryview(piece) for piece in (b"0123456789", b"", b"ab", b"cdef")])
    assert files.path_of(a_name()).read_bytes() == b"0123456789abcdef"


@pytest.mark.parametrize("tenant_id", ODD_TENANTS)
def test_a_tenant_of_any_name_has_a_folder_below_the_root(files: DiskFiles, tmp_path: Path, tenant_id: str) -> None:
    name = a_name(tenant_id=tenant_id)
    write(files, name)
    path = files.path_of(name)
    assert path.resolve().is_relative_to(tmp_path.resolve() / "objects")
    assert files.tenants() == [tenant_id]
    assert [(found.name, found.size_bytes, found.path) for found in files.scan()] == [(name, 4, path)]


def test_tenants_are_found_again_by_another_process(files: DiskFiles, tmp_path: Path) -> None:
    for tenant_id in ODD_TENANTS:
        write(files, a_name(tenant_id=tenant_id))
    assert sorted(DiskFiles(tmp_path).tenants()) == sorted(ODD_TENANTS)


def test_a_tenant_file_that_a_crash_emptied_is_written_again(files: DiskFiles, tmp_path: Path) -> None:
    write(files, a_name())
    (named,) = tmp_path.rglob(TENANT_FILE)
    named.write_bytes(b"")
    again = DiskFiles(tmp_path)
    assert again.tenants() == []
    write(again, a_name(2))
    assert again.tenants() == [TENANT]


STEPS = ["writev", "fsync of the file", "replace", "fsync of the folder"]


@pytest.mark.parametrize("step", STEPS)
def test_a_write_that_fails_at_any_step_leaves_nothing(
    files: DiskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write(files, a_name(1))
    before = everything(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, step)

    with monkeypatch.context() as patched:
        if step == "fsync of the folder":
            patched.setattr(disk_files, "sync_folder", fail)
        else:
            patched.setattr(os, step.split()[0], fail)
        with pytest.raises(OSError, match=step):
            write(files, a_name(1, "f2"))
    assert everything(tmp_path) == before
    write(files, a_name(1, "f2"))
    assert files.path_of(a_name(1, "f2")).read_bytes() == b"data"


def test_two_writes_of_one_object_have_files_of_their_own(files: DiskFiles) -> None:
    first, second = a_name(file_id="f1"), a_name(file_id="f2")
    write(files, first, b"old")
    write(files, second, b"new")
    files.remove(first)
    files.remove(first)
    assert files.path_of(second).read_bytes() == b"new"
    assert [found.name for found in files.scan()] == [second]


def test_what_is_none_of_ours_has_no_name(files: DiskFiles) -> None:
    write(files, a_name())
    folder = files.path_of(a_name()).parent
    strangers = ["x.safetensors", f"{'00' * 31}-f.safetensors", f"{'00' * 32}.safetensors", f"{'00' * 32}-f.txt"]
    for stranger in strangers:
        (folder / stranger).write_bytes(b"?")
    (folder / "folder").mkdir()
    names = {found.path.name: found.name for found in files.shelf(TENANT, 0)}
    assert {name for name, ours in names.items() if ours is None} == set(strangers)
    assert files.shelf(TENANT, 1) == []
    assert files.shelf("nobody", 0) == []


def test_a_quarantined_file_is_out_of_service_and_kept_for_a_while(files: DiskFiles) -> None:
    for number in range(MAX_QUARANTINED + 3):
        write(files, a_name(number), bytes(number + 1))
        files.quarantine(a_name(number))
    assert list(files.scan()) == []
    sizes = files.quarantined()
    assert len(sizes) == MAX_QUARANTINED
    assert max(sizes) == MAX_QUARANTINED + 3, "the newest stay"
    files.empty_quarantine()
    files.quarantine(a_name(9))  # it is there no more
    assert files.quarantined() == []


def test_tmp_is_emptied_at_start_and_counted(files: DiskFiles, tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.tenant"):
        (tmp_path / "tmp" / name).write_bytes(b"half")
    assert files.empty_tmp() == 2
    assert files.empty_tmp() == 0


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        DiskFiles(tmp_path / "file")
