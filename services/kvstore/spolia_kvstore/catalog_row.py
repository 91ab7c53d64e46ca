"""A stored object as a row of the catalog's table, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spolia_core.digests import DIGEST_BYTES, FRAME_BYTES
from spolia_core.ids import FORMAT_VERSION, ID_BYTES
from spolia_core.reuse import ChunkKind
from spolia_kvstore.objects import ObjectKey, ObjectRecord, Tier
from spolia_kvstore.usage import Usage

UNKNOWN_VERSION = 0
"""Given to rows of a kind that this release does not know: listed, never served."""

OBJECTS_TABLE = """
CREATE TABLE IF NOT EXISTS objects (
    tenant_id TEXT NOT NULL,
    chunk_id BLOB NOT NULL,
    tier INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    format_version INTEGER NOT NULL,
    codec TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    num_tokens INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    digest BLOB NOT NULL,
    replica TEXT NOT NULL,
    compute_s REAL NOT NULL,
    frame_digests BLOB NOT NULL,
    stored_at REAL NOT NULL,
    used_at REAL NOT NULL,
    log_uses REAL NOT NULL,
    hits INTEGER NOT NULL,
    log_cost REAL NOT NULL,
    file_id TEXT NOT NULL,
    rank REAL NOT NULL,
    PRIMARY KEY (tenant_id, chunk_id, tier)
) WITHOUT ROWID
"""
COLUMNS = (
    "tenant_id, chunk_id, tier, kind, format_version, codec, fingerprint, num_tokens, size_bytes, digest, replica, "
    "compute_s, frame_digests, stored_at, used_at, log_uses, hits, log_cost, file_id"
)
_TYPES = (
    *(str, bytes, int, int, int, str, bytes, int, int, bytes, str, float, bytes, float, float, float, int, float, str),
)
NUM_COLUMNS = len(_TYPES)
_SQL_TYPES = {str: "text", bytes: "blob", int: "integer", float: "real"}
IS_DAMAGED = " OR ".join(
    [
        *(f"typeof({name}) != '{_SQL_TYPES[kind]}'" for name, kind in zip(COLUMNS.split(", "), _TYPES, strict=True)),
        "typeof(rank) != 'real'",
        f"tier NOT IN ({', '.join(str(tier.value) for tier in Tier)})",
        "tenant_id = ''",
        f"length(chunk_id) != {ID_BYTES}",
        # Digests are of frames of this length: another one needs another version of the schema.
        f"format_version = {FORMAT_VERSION} AND "
        f"length(frame_digests) != {DIGEST_BYTES} * ((size_bytes + {FRAME_BYTES - 1}) / {FRAME_BYTES})",
    ]
)
"""SQL that holds for rows that no release has written: SQLite keeps whatever a damaged file says."""

_KINDS = {kind.value: kind for kind in ChunkKind}
_TIERS = {tier.value: tier for tier in Tier}


@dataclass(frozen=True, slots=True)
class Row:
    """One stored object. `file_id` and the key name its file."""

    record: ObjectRecord
    tier: Tier
    usage: Usage
    frame_digests: tuple[bytes, ...] = ()
    file_id: str = ""


def values_of(row: Row) -> tuple[Any, ...]:
    """Its values, in the order of `COLUMNS`."""
    record, usage = row.record, row.usage
    return (
        *(*record.key, int(row.tier), int(record.kind), record.format_version, record.codec, record.fingerprint),
        *(record.num_tokens, record.size_bytes, record.digest, record.replica, record.compute_s),
        *(b"".join(row.frame_digests), usage.stored_at, usage.used_at, usage.log_uses, usage.hits, usage.log_cost),
        row.file_id,
    )


def row_of(values: Sequence[Any]) -> Row | None:
    """The row; None for values that no release has written."""
    if tuple(map(type, values)) != _TYPES or values[2] not in _TIERS:
        return None
    (tenant_id, chunk_id, tier, kind, version, codec, fingerprint, num_tokens, size, digest, replica, *rest) = values
    compute_s, frames, stored_at, used_at, log_uses, hits, log_cost, file_id = rest
    known = _KINDS.get(kind)
    if known is None and version == FORMAT_VERSION:
        version = UNKNOWN_VERSION
    record = ObjectRecord(
        key=ObjectKey(tenant_id, chunk_id),
        kind=known or ChunkKind.LOCAL,
        format_version=version,
        codec=codec,
        fingerprint=fingerprint,
        num_tokens=num_tokens,
        size_bytes=size,
        digest=digest,
        replica=replica,
        compute_s=compute_s,
    )
    frame_digests = tuple(frames[i : i + DIGEST_BYTES] for i in range(0, len(frames), DIGEST_BYTES))
    return Row(record, _TIERS[tier], Usage(stored_at, used_at, log_uses, hits, log_cost), frame_digests, file_id)
