"""A file of the disk tier, open for reading; its errors are errors.

Read by position rather than mapped: touching a mapped page that the disk cannot give, or that a truncated file no
longer has, kills the process with SIGBUS. A read costs the one copy that a message needs anyway, straight from the page
cache, and runs without Python's lock.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class ObjectFile:
    """The whole of a file. Raises `OSError`, also for one that has not `size` bytes. `close` it."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._path = path
        self.size = size
        try:
            found = os.fstat(self._file).st_size
            if found != size or size == 0:
                raise OSError(errno.EIO, f"it has {found} bytes, {size} were written", str(path))
        except BaseException:
            self.close()
            raise

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` … `end`, cut at the end of the object. Raises `OSError` when the disk cannot give them all."""
        end = min(end, self.size)
        data = os.pread(self._file, end - start, start)
        if len(data) != end - start:
            data += self._rest(start + len(data), end)
        return data

    def close(self) -> None:
        """Ends it. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _rest(self, start: int, end: int) -> bytes:
        """A read may end early for a signal; only one that gives nothing means that nothing is there."""
        pieces = []
        while start < end:
            piece = os.pread(self._file, end - start, start)
            if not piece:
                raise OSError(errno.EIO, f"bytes {start} … {end} are not there", str(self._path))
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)
