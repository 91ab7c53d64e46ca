"""Between `ObjectInfo`, as objects are announced and listed on the wire and in Redis, and the store's records."""

from __future__ import annotations

from spolia.v1 import common_pb2
from spolia_core.reuse import ChunkKind
from spolia_kvstore.objects import ObjectKey, ObjectRecord


def info_of(record: ObjectRecord) -> common_pb2.ObjectInfo:
    """A record without its tenant."""
    return common_pb2.ObjectInfo(
        chunk_id=record.key.chunk_id,
        kind=common_pb2.ChunkKind.ValueType(record.kind),
        format_version=record.format_version,
        codec=record.codec,
        fingerprint=record.fingerprint,
        num_tokens=record.num_tokens,
        size_bytes=record.size_bytes,
        digest=record.digest,
        replica=record.replica,
        compute_s=record.compute_s,
    )


def record_of_info(key: ObjectKey, info: common_pb2.ObjectInfo) -> ObjectRecord:
    """The record of a tenant's object. Raises `ValueError` for a kind that this release does not know."""
    return ObjectRecord(
        key=key,
        kind=ChunkKind(info.kind),
        format_version=info.format_version,
        codec=info.codec,
        fingerprint=info.fingerprint,
        num_tokens=info.num_tokens,
        size_bytes=info.size_bytes,
        digest=info.digest,
        replica=info.replica,
        compute_s=info.compute_s,
    )
