"""A book of API keys in a file."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spolia_core.errors import Busy, InvalidRequest
from spolia_core.key_book import KeyBook

LOCK_TIMEOUT_S = 5.0


class KeyFile:
    """The file at `path`. Changes are whole for whoever reads, and wait for each other on a lock file beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self._path)

    def read(self) -> bytes:
        """See `KeyPlace`."""
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise InvalidRequest(f"keys: {self._path} cannot be read: {error.strerror}", field="keys") from error

    def change(self, change: Callable[[KeyBook], KeyBook]) -> None:
        """See `KeyPlace`. A new file is for its owner alone; another keeps the rights it has."""
        try:
            with self._locked():
                old = self.read() if self._path.exists() else b""
                self._replace(change(KeyBook.from_bytes(old)).to_bytes())
        except OSError as error:
            raise InvalidRequest(f"keys: {self._path} cannot be written: {error.strerror}", field="keys") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        deadline_s = time.monotonic() + LOCK_TIMEOUT_S
        with self._path.with_name(f".{self._path.name}.lock").open("a") as lock:
            while not _try_lock(lock.fileno()):
                if time.monotonic() > deadline_s:
                    raise Busy(f"keys: {self._path} is being changed by another process", field="keys")
                time.sleep(0.02)
            yield

    def _replace(self, content: bytes) -> None:
        mode = self._path.stat().st_mode & 0o777 if self._path.exists() else 0o600
        number, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(number, "wb") as file:
                os.fchmod(number, mode)
                file.write(content)
                file.flush()
                os.fsync(number)
            os.replace(name, self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _try_lock(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
