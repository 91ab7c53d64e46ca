"""A node's certificate, its key and the authorities it believes, from files that may be replaced at any time.

Nothing watches the files: they are looked at, at most once a second, when a connection begins, which is the moment at
which they count. What is there is taken over only when it would work: a key that does not fit its certificate is what
a rotation looks like half-way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from spolia_core.errors import InvalidRequest
from spolia_core.node_name import AUTHORITY_FILE, node_dns_name, node_uri, role_in
from spolia_node.logs import get_log

LOOK_EVERY_S = 1.0
SETTING = "tls_dir"

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What was read at one moment, checked. Equal bytes are equal credentials."""

    chain_pem: bytes
    key_pem: bytes
    authority_pem: bytes
    expires_at: datetime

    def __repr__(self) -> str:
        return f"Credentials(expires_at={self.expires_at.isoformat()})"


class NodeCertificates:
    """The files of one role in a folder: `ROLE.crt` and `ROLE.key`, else `tls.crt` and `tls.key`, and `ca.crt`.

    May be asked from any thread. Making one raises `InvalidRequest`, naming the file, unless the certificate could be
    used now: of this role, by an authority in `ca.crt`, within its time, with its key.
    """

    def __init__(self, folder: Path, role: str, now: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._role = role
        self._now = now
        self._lock = threading.Lock()
        self._seen = _state_of(self._paths())
        self._current = self._read()
        self._look_at_s = now() + LOOK_EVERY_S

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

    def _paths(self) -> tuple[Path, Path, Path]:
        own = self._folder / f"{self._role}.crt"
        stem = self._role if own.exists() else "tls"
        return self._folder / f"{stem}.crt", self._folder / f"{stem}.key", self._folder / AUTHORITY_FILE

    def _read(self) -> Credentials:
        chain, key, authority = self._paths()
        chain_pem, key_pem, authority_pem = (_bytes_of(path) for path in (chain, key, authority))
        leaf = _certificates_in(chain_pem, chain)[0]
        _check_role(leaf, self._role, chain)
        _check_time(leaf, chain)
        _check_key(leaf, key_pem, key)
        _check_authority(_certificates_in(chain_pem, chain), _certificates_in(authority_pem, authority), chain)
        return Credentials(chain_pem, key_pem, authority_pem, leaf.not_valid_after_utc)


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


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from error


def _certificates_in(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise _unusable(path, f"holds no PEM certificate: {error}") from error


def _check_role(leaf: x509.Certificate, role: str, path: Path) -> None:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise _unusable(path, f"has no alternative names; it needs {node_uri(role)}") from None
    found = role_in(names.get_values_for_type(x509.UniformResourceIdentifier))
    if found != role:
        raise _unusable(path, f"is for {found or 'no role'}, not {role}; it needs the one URI {node_uri(role)}")
    if node_dns_name(role) not in names.get_values_for_type(x509.DNSName):
        raise _unusable(path, f"needs {node_dns_name(role)} among its DNS names")


def _check_time(leaf: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if leaf.not_valid_after_utc < now:
        raise _unusable(path, f"expired at {leaf.not_valid_after_utc.isoformat()}")
    if leaf.not_valid_before_utc > now:
        raise _unusable(path, f"is valid from {leaf.not_valid_before_utc.isoformat()} only; is the clock right?")


def _check_key(leaf: x509.Certificate, key_pem: bytes, path: Path) -> None:
    try:
        public = load_pem_private_key(key_pem, password=None).public_key()
    except (ValueError, TypeError) as error:
        raise _unusable(path, f"holds no private key without a password: {error}") from error
    if public != leaf.public_key():
        raise _unusable(path, "is not the key of its certificate")


def _check_authority(chain: list[x509.Certificate], authorities: list[x509.Certificate], path: Path) -> None:
    """The last certificate of the chain must be signed by one that is believed, and each by the next."""
    for child, parent in pairwise(chain):
        if not _is_signed_by(child, parent):
            raise _unusable(path, "is no chain: a certificate in it is not signed by the next")
    if not any(_is_signed_by(chain[-1], authority) for authority in authorities):
        raise _unusable(path, f"is signed by no certificate in {AUTHORITY_FILE}")


def _is_signed_by(child: x509.Certificate, parent: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _unusable(path: Path, why: str) -> InvalidRequest:
    return InvalidRequest(f"{SETTING}: {path} {why}", field=SETTING, actual=str(path))
