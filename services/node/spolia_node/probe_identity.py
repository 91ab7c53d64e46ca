"""Who a probe is: the node itself. It shows the node's certificate and expects that very node to answer.

Files are read, not checked: the handshake does that, and a probe is to be quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spolia_core.errors import InvalidRequest
from spolia_core.node_name import AUTHORITY_FILE, NODE_ROLES, node_dns_name, role_in
from spolia_node.probe_settings import ProbeSettings

NODES, FRONT_DOOR = "tls_dir", "public_tls_dir"


@dataclass(frozen=True, slots=True)
class _Names:
    uris: list[str]
    hosts: list[str]


@dataclass(frozen=True, slots=True)
class ProbeIdentity:
    """What a handshake with the node needs."""

    believed_pem: bytes
    """Who may vouch for the node."""
    expected_name: str
    """A name that its certificate must have."""
    key_pem: bytes | None = None
    chain_pem: bytes | None = None

    def __repr__(self) -> str:
        return f"ProbeIdentity(expected_name={self.expected_name})"


def identity_of(settings: ProbeSettings) -> ProbeIdentity | None:
    """None for a node in plaintext. Raises `InvalidRequest` for files that cannot be used.

    A gateway asks callers for no certificate, and may show one of an authority that nodes do not believe; then that
    certificate is all that is believed.
    """
    if settings.public_tls_dir is not None:
        return _of_front_door(settings.public_tls_dir / "tls.crt")
    if settings.tls_dir is None:
        return None
    folder = settings.tls_dir
    stem = _stem(folder, settings.role)
    chain_path = folder / f"{stem}.crt"
    chain = _bytes_of(chain_path)
    role = settings.role or (stem if stem in NODE_ROLES else _role_of(chain, chain_path))
    return ProbeIdentity(
        _bytes_of(folder / AUTHORITY_FILE), node_dns_name(role), _bytes_of(folder / f"{stem}.key"), chain
    )


def _stem(folder: Path, role: str) -> str:
    """The name of the files that a node would take."""
    roles = [name for name in ([role] if role else NODE_ROLES) if (folder / f"{name}.crt").exists()]
    if len(roles) > 1:
        raise InvalidRequest(f"{folder} has certificates of {', '.join(roles)}: say which with --role", field="role")
    return roles[0] if roles else "tls"


def _of_front_door(path: Path) -> ProbeIdentity:
    shown = _bytes_of(path)
    names = _names_in(shown, path)
    if not names.hosts:
        raise InvalidRequest(f"{path} has no DNS name and no address among its alternative names", field=FRONT_DOOR)
    return ProbeIdentity(shown, names.hosts[0].replace("*", "any", 1))


def _role_of(chain: bytes, path: Path) -> str:
    role = role_in(_names_in(chain, path).uris)
    if role not in NODE_ROLES:
        raise InvalidRequest(f"{path} is for {role or 'no role'}, which is no node", field=NODES, actual=role)
    return role


def _names_in(chain: bytes, path: Path) -> _Names:
    """The alternative names of the first certificate."""
    from cryptography import x509  # a third of a probe's time, where a file's name does not say the role

    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except ValueError as error:
        raise InvalidRequest(f"{path} holds no PEM certificate: {error}", field=NODES) from error
    except x509.ExtensionNotFound:
        return _Names([], [])
    hosts = names.get_values_for_type(x509.DNSName)
    hosts += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return _Names(names.get_values_for_type(x509.UniformResourceIdentifier), hosts)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", field=NODES) from error
