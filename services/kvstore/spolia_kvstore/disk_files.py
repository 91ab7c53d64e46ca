"""Files of the disk tier: one for each object, the same bytes as in memory and on the wire.

    objects/<tenant>/<2 hex digits>/<chunk id>-<file id>.safetensors     what the index names
    tmp/                                                                 being written; emptied at start
    quarantine/                                                          failed a digest; for people to look at

A file is written under tmp/, synced, renamed, and its folder is synced: under its final name it is whole, whenever the
process or the machine dies. Each write has a file id of its own, so deleting an old file can never hit a new one. A
tenant may have any name, so its folder is named for a digest of it; the name is in the file "tenant" there. No index,
no decisions: methods block, and raise `OSError` for what the disk does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import xxhash

from spolia_core.ids import ID_BYTES
from spolia_kvstore.objects import ObjectKey

SUFFIX = ".safetensors"
TENANT_FILE = "tenant"
MAX_QUARANTINED = 64
_MAX_PIECES = 512  # the kernel takes 1,024 in one call


class FileName(NamedTuple):
    """Names the file of one write of an object."""

    key: ObjectKey
    file_id: str


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file in the objects folder. `name` is None when it is none of ours."""

    path: Path
    name: FileName | None
    size_bytes: int


class DiskFiles:
    """Files under one folder, which this process alone writes to. Makes the folders; raises `OSError`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._objects, self._tmp, self._quarantine = (root / name for name in ("objects", "tmp", "quarantine"))
        for folder in (self._objects, self._tmp, self._quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        self._numbers = count(1)
        self._known_folders: set[Path] = set()

    def path_of(self, name: FileName) -> Path:
        """Where the file is, or would be."""
        chunk = name.key.chunk_id.hex()
        return self._objects / _folder_of(name.key.tenant_id) / chunk[:2] / f"{chunk}-{name.file_id}{SUFFIX}"

    def write(self, name: FileName, pieces: Iterable[memoryview]) -> None:
        """Writes an object so that it survives from when this returns; leaves nothing when it raises."""
        temporary = self._tmp / f"{next(self._numbers)}{SUFFIX}"
        path = self.path_of(name)
        try:
            with open(temporary, "wb", buffering=0) as file:
                _write_all(file.fileno(), pieces)
                os.fsync(file.fileno())
            self._make_folder(name.key.tenant_id, path.parent)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            for unfinished in (temporary, path):
                with suppress(OSError):
                    unfinished.unlink()
            raise

    def remove(self, name: FileName) -> None:
        """Deletes a file; one that is not there is ignored. Readers that have it open finish."""
        path = self.path_of(name)
        with suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def quarantine(self, name: FileName) -> None:
        """Takes a file out of service, and keeps it for people to look at; the oldest of many go."""
        kept = sorted(self._quarantine.iterdir(), key=lambda path: path.stat().st_ctime)  # when it was moved
        for path in kept[: max(0, len(kept) - MAX_QUARANTINED + 1)]:
            path.unlink(missing_ok=True)
        path = self.path_of(name)
        with suppress(FileNotFoundError):
            os.replace(path, self._quarantine / f"{_folder_of(name.key.tenant_id)}-{path.name}")

    def quarantined(self) -> list[int]:
        """Sizes of the files in quarantine."""
        return [path.stat().st_size for path in self._quarantine.iterdir()]

    def empty_quarantine(self) -> None:
        """Deletes what is in quarantine."""
        for path in self._quarantine.iterdir():
            path.unlink(missing_ok=True)

    def empty_tmp(self) -> int:
        """Deletes what was being written when a process died; how many files that was. At start only."""
        paths = list(self._tmp.iterdir())
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def tenants(self) -> list[str]:
        """Tenants with a folder."""
        names = []
        for folder in _folders(self._objects):
            with suppress(OSError, UnicodeDecodeError):
                name = (folder / TENANT_FILE).read_bytes().decode()
                if _folder_of(name) == folder.name:
                    names.append(name)
        return names

    def shelf(self, tenant_id: str, first_byte: int) -> list[FoundFile]:
        """A tenant's files whose chunk id begins with this byte, foreign ones in that folder too."""
        folder = self._objects / _folder_of(tenant_id) / f"{first_byte:02x}"
        try:
            with os.scandir(folder) as entries:
                return [
                    FoundFile(Path(entry.path), _name_of(tenant_id, entry.name), entry.stat().st_size)
                    for entry in entries
                    if entry.is_file(follow_symlinks=False)
                ]
        except FileNotFoundError:
            return []

    def shelves(self, tenant_id: str) -> set[int]:
        """The bytes with which a tenant's files begin."""
        home = self._objects / _folder_of(tenant_id)
        if not home.is_dir():
            return set()
        return {int(folder.name, 16) for folder in _folders(home) if re.fullmatch("[0-9a-f]{2}", folder.name)}

    def scan(self) -> Iterator[FoundFile]:
        """Every file under objects/, shelf by shelf."""
        for tenant_id in self.tenants():
            for first_byte in sorted(self.shelves(tenant_id)):
                yield from self.shelf(tenant_id, first_byte)

    def _make_folder(self, tenant_id: str, folder: Path) -> None:
        if folder in self._known_folders:
            return
        home = folder.parent
        folder.mkdir(parents=True, exist_ok=True)
        named, text = home / TENANT_FILE, tenant_id.encode()
        if not (named.exists() and named.read_bytes() == text):
            temporary = self._tmp / f"{next(self._numbers)}.tenant"
            with open(temporary, "wb", buffering=0) as file:
                file.write(text)
                os.fsync(file.fileno())
            os.replace(temporary, named)
        for parent in (home, self._objects):
            sync_folder(parent)
        self._known_folders.add(folder)


def sync_folder(path: Path) -> None:
    """Makes the folder's entries durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _folder_of(tenant_id: str) -> str:
    return xxhash.xxh3_128_hexdigest(tenant_id.encode())


def _folders(path: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))


def _name_of(tenant_id: str, file_name: str) -> FileName | None:
    if not file_name.endswith(SUFFIX):
        return None
    chunk, dash, file_id = file_name.removesuffix(SUFFIX).partition("-")
    try:
        chunk_id = bytes.fromhex(chunk)
    except ValueError:
        return None
    is_ours = len(chunk_id) == ID_BYTES and bool(dash and file_id)
    return FileName(ObjectKey(tenant_id, chunk_id), file_id) if is_ours else None


def _write_all(file: int, pieces: Iterable[memoryview]) -> None:
    waiting: list[memoryview] = []
    for piece in pieces:
        waiting.append(piece)
        if len(waiting) == _MAX_PIECES:
            _write_pieces(file, waiting)
            waiting = []
    _write_pieces(file, waiting)


def _write_pieces(file: int, pieces: list[memoryview]) -> None:
    while pieces:
        written = os.writev(file, pieces)
        while pieces and written >= len(pieces[0]):
            written -= len(pieces[0])
            pieces.pop(0)
        if written:
            pieces[0] = pieces[0][written:]
