"""API keys: who may ask a gateway, for which tenant, as what, and how much a tenant may have at once.

A book holds what proves a key, never the key: its SHA-256. One round of a fast hash is right here, where it would be
wrong for a password: a key is 256 bits from the system's generator, so there is nothing to guess from a list of likely
ones, and no number of hashes a second searches 2²⁵⁶. A slow hash would cost every request and protect nothing. The same
holds for a salt: no two keys are alike, and no table of them can be made.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from spolia_core.errors import InvalidRequest, NotFound
from spolia_core.field_checks import check_field
from spolia_core.ids import MAX_TENANT_BYTES, SHARED_TENANT, is_tenant_id

KEY_PREFIX = "sk-spolia-"
"""What every key begins with, so that scanners for leaked secrets can find them."""

KEY_BYTES = 32
MAX_KEY_CHARS = 256
FORMAT = 1
MAX_NAME_CHARS = 200
MAX_LIMIT = 2**63 - 1


class Role(Enum):
    """What a key may do."""

    USER = "user"
    """Ask, warm, forget and tokenize for its tenant, and list models."""
    OPERATOR = "operator"
    """That, and see the cluster. Only an operator's key may be of the tenant `shared`, whose documents all read."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """How much a tenant may have at once, whatever the number of its keys; 0 is no limit."""

    max_requests: int = 0
    """Requests under way, at each gateway."""
    max_tokens: int = 0
    """Tokens in flight, at each gateway: of a request its prompt and all it may generate."""
    max_cache_bytes: int = 0
    """Bytes of chunk objects, in each store."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key, without the key."""

    key_id: str
    sha256: str
    """In hexadecimal."""
    tenant_id: str
    roles: frozenset[Role]
    created_at: datetime
    expires_at: datetime | None = None
    name: str = ""
    """Whose it is, for people."""


@dataclass(frozen=True, slots=True)
class KeyBook:
    """Keys by their hash, and the limits of tenants. A value: changing it makes another."""

    keys: Mapping[str, KeyRecord] = field(default_factory=dict)
    limits: Mapping[str, TenantLimits] = field(default_factory=dict)

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key, also of one that has expired.

        The time a look-up takes tells of hashes only, from which no key follows.
        """
        return self.keys.get(hash_of(key)) if len(key) <= MAX_KEY_CHARS else None

    def limits_of(self, tenant_id: str) -> TenantLimits:
        """A tenant's limits; none where the book says nothing."""
        return self.limits.get(tenant_id, TenantLimits())

    def tenant_ids(self) -> list[str]:
        """Every tenant that is mentioned, in order."""
        return sorted({record.tenant_id for record in self.keys.values()} | set(self.limits))

    def with_key(self, record: KeyRecord) -> KeyBook:
        """Also with that key."""
        return replace(self, keys={**self.keys, record.sha256: record})

    def without_key(self, key_id: str) -> KeyBook:
        """Without one. Raises `NotFound`."""
        kept = {sha256: record for sha256, record in self.keys.items() if record.key_id != key_id}
        if len(kept) == len(self.keys):
            raise NotFound(f"there is no key {key_id}", field="key_id", actual=key_id)
        return replace(self, keys=kept)

    def only(self, keep: Callable[[KeyRecord], bool]) -> KeyBook:
        """With the keys that `keep` says yes to."""
        return replace(self, keys={sha256: record for sha256, record in self.keys.items() if keep(record)})

    def with_limits(self, tenant_id: str, limits: TenantLimits) -> KeyBook:
        """With these limits of a tenant in place of its own."""
        _check_tenant(tenant_id, "tenant")
        return replace(self, limits={**self.limits, tenant_id: limits})

    def to_bytes(self) -> bytes:
        """As JSON, the same bytes for the same book."""
        keys = sorted(self.keys.values(), key=lambda record: (record.created_at, record.key_id))
        content = {
            "format": FORMAT,
            "tenants": {name: _plain_limits(self.limits[name]) for name in sorted(self.limits)},
            "keys": [_plain_key(record) for record in keys],
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> KeyBook:
        """Reads what `to_bytes` writes; nothing at all is an empty book. Raises `InvalidRequest` naming the field."""
        if not content.strip():
            return cls()
        try:
            table = json.loads(content)
        except ValueError as error:
            raise InvalidRequest(f"the keys are no JSON: {error}", field="keys") from error
        check_field(isinstance(table, dict), "the keys", "one JSON object", table)
        check_field(table.get("format") == FORMAT, "format", str(FORMAT), table.get("format"))
        _check_names(table, {"format", "tenants", "keys"}, "the keys")
        tenants, keys = table.get("tenants", {}), table.get("keys", [])
        check_field(isinstance(tenants, dict), "tenants", "an object", tenants)
        check_field(isinstance(keys, list), "keys", "a list", keys)
        records = [_read_key(item, f"keys[{index}]") for index, item in enumerate(keys)]
        book = cls({record.sha256: record for record in records}, _read_tenants(tenants))
        unique = {record.key_id for record in records}
        check_field(len(unique) == len(book.keys) == len(records), "keys", "without repetition", "a key twice")
        return book


def new_key(
    tenant_id: str,
    roles: frozenset[Role] = frozenset({Role.USER}),
    *,
    expires_at: datetime | None = None,
    name: str = "",
    now: datetime | None = None,
) -> tuple[str, KeyRecord]:
    """A key and its record. The key is to be shown once, to whom it is for, and kept nowhere.

    Raises `InvalidRequest` for a tenant or a name that cannot be, and for the tenant `shared` without an operator.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    created_at = (now or datetime.now(UTC)).replace(microsecond=0)
    record = KeyRecord(
        f"key-{secrets.token_hex(6)}", hash_of(key), tenant_id, roles, created_at, expires_at=expires_at, name=name
    )
    _check_record(record, "key")
    return key, record


def hash_of(key: str) -> str:
    """What a book holds of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _check_tenant(tenant_id: object, where: str) -> None:
    ok = isinstance(tenant_id, str) and is_tenant_id(tenant_id)
    check_field(ok, where, f"1 … {MAX_TENANT_BYTES} bytes of printable ASCII", tenant_id)


def _check_record(record: KeyRecord, where: str) -> None:
    _check_tenant(record.tenant_id, f"{where}.tenant")
    check_field(bool(record.roles), f"{where}.roles", "at least one role", "none")
    is_operator = Role.OPERATOR in record.roles
    check_field(
        is_operator or record.tenant_id != SHARED_TENANT,
        f"{where}.roles",
        f"operator, as its tenant is {SHARED_TENANT}",
        ", ".join(sorted(role.value for role in record.roles)),
    )
    ok = len(record.name) <= MAX_NAME_CHARS and record.name.isprintable()
    check_field(ok, f"{where}.name", f"at most {MAX_NAME_CHARS} printable characters", record.name)


def _plain_limits(limits: TenantLimits) -> dict[str, int]:
    return {name: getattr(limits, name) for name in TenantLimits.__slots__}


def _plain_key(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.key_id,
        "sha256": record.sha256,
        "tenant": record.tenant_id,
        "roles": sorted(role.value for role in record.roles),
        "created_at": record.created_at.isoformat(),
        "expires_at": None if record.expires_at is None else record.expires_at.isoformat(),
        "name": record.name,
    }


def _read_tenants(tenants: Mapping[str, object]) -> dict[str, TenantLimits]:
    read = {}
    for tenant_id, table in tenants.items():
        where = f"tenants.{tenant_id}"
        _check_tenant(tenant_id, where)
        check_field(isinstance(table, dict), where, "an object", table)
        assert isinstance(table, dict)
        _check_names(table, set(TenantLimits.__slots__), where)
        for name, value in table.items():
            ok = type(value) is int and 0 <= value <= MAX_LIMIT
            check_field(ok, f"{where}.{name}", "a whole number ≥ 0", value)
        read[tenant_id] = TenantLimits(**table)
    return read


def _read_key(item: object, where: str) -> KeyRecord:
    check_field(isinstance(item, dict), where, "an object", item)
    assert isinstance(item, dict)
    _check_names(item, {"id", "sha256", "tenant", "roles", "created_at", "expires_at", "name"}, where)
    sha256, roles = item.get("sha256"), item.get("roles", ["user"])
    ok = isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
    check_field(ok, f"{where}.sha256", "64 hexadecimal digits", sha256)
    known = {role.value for role in Role}
    ok = isinstance(roles, list) and all(isinstance(role, str) and role in known for role in roles)
    check_field(ok, f"{where}.roles", f"a list of {', '.join(sorted(known))}", roles)
    for name in ("id", "name"):
        check_field(isinstance(item.get(name, ""), str), f"{where}.{name}", "text", item.get(name))
    check_field(bool(item.get("id")), f"{where}.id", "not empty", item.get("id"))
    expires_at = item.get("expires_at")
    record = KeyRecord(
        item["id"],
        str(sha256),
        item.get("tenant", ""),
        frozenset(Role(role) for role in roles),
        _read_time(item.get("created_at"), f"{where}.created_at"),
        None if expires_at is None else _read_time(expires_at, f"{where}.expires_at"),
        item.get("name", ""),
    )
    _check_record(record, where)
    return record


def _read_time(text: object, where: str) -> datetime:
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        time = None
    ok = time is not None and time.tzinfo is not None
    check_field(ok, where, "a time with its offset, as 2027-01-31T12:00:00+00:00", text)
    assert time is not None
    return time


def _check_names(table: Mapping[str, object], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    check_field(not unknown, where, f"made of {', '.join(sorted(known))}", ", ".join(unknown))
