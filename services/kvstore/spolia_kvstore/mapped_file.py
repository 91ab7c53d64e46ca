"""A file mapped for reading, whose errors are errors.

Touching a mapped page that cannot be read, or that a truncated file no longer has, kills the process with SIGBUS. So
pages are brought in first by a call that can fail: `madvise(MADV_POPULATE_READ)` (Linux 5.14), or a plain read where
the kernel does not know it. Both run without Python's lock, so a slow disk stops nobody.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedFile:
    """The whole of a file. Raises `OSError`, also for one that has not `size` bytes. `close` it."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        try:
            found = os.fstat(self._file).st_size
            if found != size or size == 0:
                raise OSError(errno.EIO, f"it has {found} bytes, {size} were written", str(path))
            # Copy-on-write, never written: only a writable mapping tells its address.
            self._map = mmap.mmap(self._file, size, access=mmap.ACCESS_COPY)
        except BaseException:
            os.close(self._file)
            raise
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._path = path
        self.size = size

    def read(self, start: int, end: int) -> bytes:
        """A copy of bytes `start` … `end`. Raises `OSError` when the disk cannot give them."""
        self.bring_in(start, end)
        return self._map[start:end]

    def bring_in(self, start: int, end: int) -> None:
        """Makes these bytes safe to touch. Raises `OSError`."""
        start -= start % mmap.PAGESIZE
        end = min(end, self.size)
        if _libc.madvise(self._address + start, end - start, _MADV_POPULATE_READ) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            number = errno.EIO if number == errno.EFAULT else number
            raise OSError(number, f"bytes {start} … {end} cannot be read: {os.strerror(number)}", str(self._path))
        scratch = bytearray(end - start)
        if os.preadv(self._file, [scratch], start) != len(scratch):
            raise OSError(errno.EIO, f"bytes {start} … {end} are not there", str(self._path))

    def close(self) -> None:
        """Ends the mapping. Idempotent."""
        if self._file >= 0:
            self._map.close()
            os.close(self._file)
            self._file = -1
