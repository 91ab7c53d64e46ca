"""An authority of one's own, in a folder: `ca.crt`, `ca.key`, and a certificate and key for each role of a node.

Needs the library `cryptography`, which the extras `cli` and `node` bring. For development and small installations;
anything that signs certificates with the same names will do as well (docs/security.md).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from spolia_core.errors import InvalidRequest
from spolia_core.node_name import AUTHORITY_FILE, CERTIFIED_ROLES, node_dns_name, node_uri

AUTHORITY_KEY_FILE = "ca.key"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
CLOCK_SKEW = timedelta(minutes=5)
"""Certificates begin that long ago: clocks of machines differ."""


class LocalAuthority:
    """Signs certificates of nodes. The one who has its key can be any node."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, lifetime: timedelta) -> LocalAuthority:
        """A new one, with a key that nobody has seen."""
        key = _new_key()
        name = _named("Spolia local authority")
        certificate = (
            _begun(name, name, key.public_key(), lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def open(cls, folder: Path) -> LocalAuthority:
        """The one in a folder. Raises `InvalidRequest` where there is none."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / AUTHORITY_FILE).read_bytes())
            key = serialization.load_pem_private_key((folder / AUTHORITY_KEY_FILE).read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{folder} holds no authority: {error}", field="folder", actual=str(folder)) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise InvalidRequest(f"{folder}: {AUTHORITY_KEY_FILE} is not the key of {AUTHORITY_FILE}", field="folder")
        return cls(certificate, key)

    def save(self, folder: Path) -> None:
        """Writes certificate and key; the key for its owner alone."""
        _write(folder / AUTHORITY_KEY_FILE, _key_pem(self._key), 0o600)
        _write(folder / AUTHORITY_FILE, _pem(self._certificate), 0o644)

    def issue(self, folder: Path, role: str, lifetime: timedelta, hosts: Iterable[str] = LOCAL_NAMES) -> None:
        """Writes `ROLE.crt` and `ROLE.key`: a new key, and the certificate of a node that clients reach by `hosts`."""
        key = _new_key()
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(node_uri(role)),
            x509.DNSName(node_dns_name(role)),
        ]
        names += [_alternative(host) for host in dict.fromkeys(hosts)]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _begun(_named(f"spolia {role}"), self._certificate.subject, key.public_key(), lifetime)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        # A node that looks between the two finds a key that does not fit, and goes on with what it has.
        _write(folder / f"{role}.key", _key_pem(key), 0o600)
        _write(folder / f"{role}.crt", _pem(certificate), 0o644)


def init_authority(folder: Path, lifetime: timedelta, hosts: Sequence[str] = ()) -> None:
    """A new authority in `folder`, made if need be, and a certificate for every role.

    Raises `InvalidRequest` where there is one already: a second would shut out what the first let in.
    """
    if (folder / AUTHORITY_FILE).exists() or (folder / AUTHORITY_KEY_FILE).exists():
        raise InvalidRequest(
            f"{folder} has an authority; spolia certs renew makes new certificates under it",
            field="folder",
            actual=str(folder),
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be made: {error.strerror}", field="folder") from error
    authority = LocalAuthority.create(10 * lifetime)
    authority.save(folder)
    _issue_all(authority, folder, CERTIFIED_ROLES, lifetime, hosts)


def renew_certificates(
    folder: Path, lifetime: timedelta, hosts: Sequence[str] = (), roles: Sequence[str] = CERTIFIED_ROLES
) -> None:
    """New keys and certificates for `roles`, under the authority in `folder`. Nodes that run take them over."""
    for role in roles:
        if role not in CERTIFIED_ROLES:
            limit = ", ".join(CERTIFIED_ROLES)
            raise InvalidRequest(f"there is no role {role!r}", field="role", limit=limit, actual=role)
    _issue_all(LocalAuthority.open(folder), folder, roles, lifetime, hosts)


def _issue_all(
    authority: LocalAuthority, folder: Path, roles: Sequence[str], lifetime: timedelta, hosts: Sequence[str]
) -> None:
    for role in roles:
        authority.issue(folder, role, lifetime, (*LOCAL_NAMES, *hosts))


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _begun(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise InvalidRequest(f"{host!r} is no host name: {error}", field="host", actual=host) from error


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replaces a file whole: whoever reads it meets the old bytes or the new ones."""
    try:
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(number, "wb") as file:
            os.fchmod(number, mode)
            file.write(content)
        os.replace(name, path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}", field="folder") from error
