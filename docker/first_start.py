"""Makes what a compose project has to have before its nodes start: certificates, secrets and the first API key.

    python first_start.py FOLDER

FOLDER has a folder for whoever is given something, each a volume of its own, so that a node finds the key of its own
role and no other. What is there already stays as it is, and certificates that end soon are made anew: run it at every
start.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from spolia.local_authority import AUTHORITY_KEY_FILE, init_authority, renew_certificates
from spolia_core.errors import InvalidRequest
from spolia_core.key_book import Role, new_key
from spolia_core.key_place import key_place
from spolia_core.node_name import AUTHORITY_FILE, CERTIFIED_ROLES, NODE_ROLES, OPERATOR

GATEWAY_HOSTS = ("gateway",)
"""Names, beside localhost, by which clients reach the gateway: this one is for those inside the project."""

LIFETIME = timedelta(days=365)
RENEWED_BEFORE = timedelta(days=30)
TENANT = "default"
KEYS_IN_NODES = "/keys/keys.json"
REDIS = "redis:6379/0"
OWNER_ONLY, FOR_ALL = 0o600, 0o444
"""Modes. Redis and Grafana run as users of their own, and each has its volume for itself."""


def prepare(folder: Path) -> list[str]:
    """Makes what is missing; a line for each thing made. Raises `InvalidRequest` for half an authority."""
    authority = folder / "authority"
    said = _certificates(authority)
    cluster_secret = _secret(authority / "cluster-secret")
    redis_password = _secret(authority / "redis-password")
    for role in CERTIFIED_ROLES:
        for name in (AUTHORITY_FILE, f"{role}.crt", f"{role}.key"):
            _write(folder / role / name, (authority / name).read_bytes(), OWNER_ONLY)
    for role in NODE_ROLES:
        settings = _settings(role, cluster_secret, redis_password)
        _write(folder / role / "spolia.toml", settings.encode(), OWNER_ONLY)
    _write(folder / "redis" / "password.conf", f"requirepass {redis_password}\n".encode(), FOR_ALL)
    _write(folder / "grafana" / "password", _secret(authority / "grafana-password").encode(), FOR_ALL)
    return said + _first_key(folder / "keys" / "keys.json", folder / OPERATOR / "api.key")


def _certificates(folder: Path) -> list[str]:
    if not (folder / AUTHORITY_FILE).exists() and not (folder / AUTHORITY_KEY_FILE).exists():
        init_authority(folder, LIFETIME, GATEWAY_HOSTS)
        return [f"an authority, and certificates of {', '.join(CERTIFIED_ROLES)}"]
    due = [role for role in CERTIFIED_ROLES if _is_due(folder / f"{role}.crt")]
    if not due:
        return []
    renew_certificates(folder, LIFETIME, GATEWAY_HOSTS, due)
    return [f"new certificates of {', '.join(due)}"]


def _is_due(path: Path) -> bool:
    if not path.exists() or not path.with_suffix(".key").exists():
        return True
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc - datetime.now(UTC) < RENEWED_BEFORE


def _settings(role: str, cluster_secret: str, redis_password: str) -> str:
    """The settings that nobody else may read; the others are in the environment."""
    lines = [f'cluster_secret = "{cluster_secret}"']
    if role in ("gateway", "kvstore"):
        lines.append(f'keys = "{KEYS_IN_NODES}"')
    if role == "kvstore":
        lines.append(f'redis_url = "redis://:{redis_password}@{REDIS}"')
    return "\n".join(lines) + "\n"


def _first_key(keys: Path, shown: Path) -> list[str]:
    if keys.exists():
        return []
    key, record = new_key(TENANT, frozenset({Role.USER, Role.OPERATOR}), name="first start")
    _write(shown, key.encode(), OWNER_ONLY)  # first: a key that is known and shown to nobody would be of no use
    key_place(str(keys)).change(lambda book: book.with_key(record))
    return [f"an operator's API key of tenant {TENANT}"]


def _secret(path: Path) -> str:
    """The one in the file; a new one where there is none."""
    if not path.exists():
        _write(path, secrets.token_hex(32).encode(), OWNER_ONLY)
    return path.read_text()


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replaces the file whole, unless that is what it holds."""
    if path.exists() and path.read_bytes() == content:
        return
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(number, "wb") as file:
        os.fchmod(number, mode)
        file.write(content)
    os.replace(name, path)


def main() -> int:
    """The exit code; says what was made."""
    folder = Path(sys.argv[1])
    try:
        said = prepare(folder)
    except (InvalidRequest, OSError) as error:
        print(f"first_start: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"made {line}" for line in said) or "everything is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
