"""A node's certificate, its key and the authorities it believes, from files that may be replaced at any time.

Nothing watches the files: they are looked at, at most once a second, when a connection begins, which is the moment at
which they count. What is there is taken over only when it would work: a key that does not fit its certificate is what
a rotation looks like half-way.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from spolia_core.errors import InvalidRequest
from spolia_core.node_name import AUTHORITY_FILE
from spolia_node.certificate_checks import (
    bytes_of,
    certificates_in,
    check_authority,
    check_key,
    check_role,
    check_time,
)
from spolia_node.logs import get_log

LOOK_EVERY_S = 1.0

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What was read at one moment, checked. Equal bytes are equal credentials."""

    chain_pem: bytes
    key_pem: bytes
    authority_pem: bytes | None
    """Who may vouch for peers; None where nobody is asked for a certificate."""
    expires_at: datetime

    def __repr__(self) -> str:
        return f"Credentials(expires_at={self.expires_at.isoformat()})"


class Certificates(ABC):
    """Files that are read again when they have changed. May be asked from any thread.

    Making one raises `InvalidRequest`, naming the file, unless the certificate could be used now.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._now = now
        self._lock = threading.Lock()
        self._seen = _state_of(self._paths())
        self._current = self._read()
        self._look_at_s = now() + LOOK_EVERY_S

    @abstractmethod
    def _paths(self) -> tuple[Path, ...]:
        """The files that matter now."""

    @abstractmethod
    def _read(self) -> Credentials:
        """What is in them, checked. Raises `InvalidRequest`."""

    def current(self) -> Credentials:
        """The newest that can be used. Files that cannot are logged, once for each state they are in."""
        with self._lock:
            if self._now() >= self._look_at_s:
                self._look()
                self._look_at_s = self._now() + LOOK_EVERY_S
            return self._current

    def _look(self) -> None:
        seen = _state_of(self._paths())
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._current = self._read()
        except InvalidRequest as error:
            log.warning("new certificates cannot be used; the old ones stay", error=error.message)
        else:
            log.info("certificates replaced", expires_at=self._current.expires_at.isoformat())


class NodeCertificates(Certificates):
    """The files of one role: `ROLE.crt` and `ROLE.key`, else `tls.crt` and `tls.key`, and `ca.crt`.

    Good is a certificate of this role, by an authority in `ca.crt`, within its time, with its key.
    """

    def __init__(self, folder: Path, role: str, now: Callable[[], float] = time.monotonic) -> None:
        self._role = role
        super().__init__(folder, now)

    def _paths(self) -> tuple[Path, Path, Path]:
        own = self._folder / f"{self._role}.crt"
        stem = self._role if own.exists() else "tls"
        return self._folder / f"{stem}.crt", self._folder / f"{stem}.key", self._folder / AUTHORITY_FILE

    def _read(self) -> Credentials:
        chain_path, key_path, authority_path = self._paths()
        chain_pem, key_pem, authority_pem = (bytes_of(path) for path in self._paths())
        chain = certificates_in(chain_pem, chain_path)
        check_role(chain[0], self._role, chain_path)
        check_time(chain[0], chain_path)
        check_key(chain[0], key_pem, key_path)
        check_authority(chain, certificates_in(authority_pem, authority_path), chain_path)
        return Credentials(chain_pem, key_pem, authority_pem, chain[0].not_valid_after_utc)


class PublicCertificates(Certificates):
    """`tls.crt` and `tls.key`, of whatever authority users believe: what a front door shows them."""

    def _paths(self) -> tuple[Path, Path]:
        return self._folder / "tls.crt", self._folder / "tls.key"

    def _read(self) -> Credentials:
        chain_path, key_path = self._paths()
        chain_pem, key_pem = bytes_of(chain_path), bytes_of(key_path)
        leaf = certificates_in(chain_pem, chain_path)[0]
        check_time(leaf, chain_path)
        check_key(leaf, key_pem, key_path)
        return Credentials(chain_pem, key_pem, None, leaf.not_valid_after_utc)


def _state_of(paths: tuple[Path, ...]) -> list[tuple[str, int, int, int]]:
    """Changes when a file is written or replaced; a file that is not there has a state too."""
    states = []
    for path in paths:
        try:
            found = path.stat()
            states.append((str(path), found.st_ino, found.st_mtime_ns, found.st_size))
        except OSError:
            states.append((str(path), 0, 0, -1))
    return states
