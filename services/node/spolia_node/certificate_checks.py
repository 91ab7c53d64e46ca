"""What must be true of certificate files before a node uses them. Every refusal names the file and what is wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from spolia_core.errors import InvalidRequest
from spolia_core.node_name import AUTHORITY_FILE, node_dns_name, node_uri, role_in

SETTING = "tls_dir"


def bytes_of(path: Path) -> bytes:
    """A file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unusable(path, f"cannot be read: {error.strerror}") from error


def certificates_in(pem: bytes, path: Path) -> list[x509.Certificate]:
    """The certificates of a file, in order."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise unusable(path, f"holds no PEM certificate: {error}") from error


def check_role(leaf: x509.Certificate, role: str, path: Path) -> None:
    """The certificate is of `role`, by its URI and its DNS name."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise unusable(path, f"has no alternative names; it needs {node_uri(role)}") from None
    found = role_in(names.get_values_for_type(x509.UniformResourceIdentifier))
    if found != role:
        raise unusable(path, f"is for {found or 'no role'}, not {role}; it needs the one URI {node_uri(role)}")
    if node_dns_name(role) not in names.get_values_for_type(x509.DNSName):
        raise unusable(path, f"needs {node_dns_name(role)} among its DNS names")


def check_time(leaf: x509.Certificate, path: Path) -> None:
    """The certificate is good now."""
    now = datetime.now(UTC)
    if leaf.not_valid_after_utc < now:
        raise unusable(path, f"expired at {leaf.not_valid_after_utc.isoformat()}")
    if leaf.not_valid_before_utc > now:
        raise unusable(path, f"is valid from {leaf.not_valid_before_utc.isoformat()} only; is the clock right?")


def check_key(leaf: x509.Certificate, key_pem: bytes, path: Path) -> None:
    """The key is the certificate's."""
    try:
        public = load_pem_private_key(key_pem, password=None).public_key()
    except (ValueError, TypeError) as error:
        raise unusable(path, f"holds no private key without a password: {error}") from error
    if public != leaf.public_key():
        raise unusable(path, "is not the key of its certificate")


def check_authority(chain: list[x509.Certificate], authorities: list[x509.Certificate], path: Path) -> None:
    """The last certificate of the chain must be signed by one that is believed, and each by the next."""
    for child, parent in pairwise(chain):
        if not _is_signed_by(child, parent):
            raise unusable(path, "is no chain: a certificate in it is not signed by the next")
    if not any(_is_signed_by(chain[-1], authority) for authority in authorities):
        raise unusable(path, f"is signed by no certificate in {AUTHORITY_FILE}")


def _is_signed_by(child: x509.Certificate, parent: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def unusable(path: Path, why: str) -> InvalidRequest:
    """The error that says so."""
    return InvalidRequest(f"{SETTING}: {path} {why}", field=SETTING, actual=str(path))
