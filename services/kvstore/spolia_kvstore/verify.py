"""What an upload must be before anybody may read it. Pure, but large objects take a while."""

from __future__ import annotations

from spolia_core.chunk_object import RAW_CODEC, ChunkMeta, parse_chunk_object
from spolia_core.digests import FRAME_BYTES, MAX_FRAME_BYTES, check_digest, digest
from spolia_core.errors import DataCorrupt, InvalidRequest, NotSupported
from spolia_core.ids import FORMAT_VERSION
from spolia_kvstore.object_store import Upload
from spolia_kvstore.objects import ObjectRecord


def check_record(record: ObjectRecord, max_object_bytes: int) -> None:
    """Raises `InvalidRequest`, naming the field, for an object this release cannot keep."""
    _require(record.format_version == FORMAT_VERSION, "info.format_version", str(FORMAT_VERSION), record.format_version)
    _require(record.codec == RAW_CODEC, "info.codec", repr(RAW_CODEC), repr(record.codec))
    _require(record.num_tokens >= 1, "info.num_tokens", "≥ 1", record.num_tokens)
    _require(
        1 <= record.size_bytes <= max_object_bytes,
        "info.size_bytes",
        f"1 … {max_object_bytes} bytes",
        record.size_bytes,
    )


def check_frame(upload: Upload, offset: int, data: bytes, frame_digest: bytes) -> None:
    """Raises `InvalidRequest` for a frame out of order or of wrong length, `DataCorrupt` for one that was damaged."""
    _require(offset == upload.num_received, "frame.offset", str(upload.num_received), offset)
    _require(1 <= len(data) <= MAX_FRAME_BYTES, "frame.data", f"1 … {MAX_FRAME_BYTES} bytes", len(data))
    end = offset + len(data)
    _require(end <= len(upload.data), "frame.data", f"{len(upload.data)} bytes in all, as announced", end)
    check_digest(data, frame_digest, f"frame at {offset} of chunk {upload.key.chunk_id.hex()}")


def check_complete(upload: Upload) -> None:
    """Raises `InvalidRequest` when the upload ended before its announced length."""
    _require(
        upload.num_received == len(upload.data),
        "info.size_bytes",
        f"{len(upload.data)} bytes, as announced",
        upload.num_received,
    )


def check_object(record: ObjectRecord, data: bytearray) -> tuple[bytes, ...]:
    """Checks whole digest, layout, metadata and layer digests; returns the digests of its frames of `FRAME_BYTES`.

    Raises `DataCorrupt` where a digest does not match and `InvalidRequest` where bytes that arrived as they were sent
    are not the object that was announced.
    """
    check_digest(data, record.digest, f"chunk object {record.key.chunk_id.hex()}")
    _check_metadata(record, _readable_meta(data))
    parse_chunk_object(data, verify=True)
    view = memoryview(data)
    return tuple(digest(view[start : start + FRAME_BYTES]) for start in range(0, len(view), FRAME_BYTES))


def _readable_meta(data: bytearray) -> ChunkMeta:
    try:
        return parse_chunk_object(data, verify=False).meta
    except (DataCorrupt, NotSupported, RecursionError) as error:
        field = getattr(error, "field", "")
        raise InvalidRequest(f"unreadable chunk object: {error}", field=f"object.{field}") from error


def _check_metadata(record: ObjectRecord, meta: ChunkMeta) -> None:
    for field, announced, found in (
        ("chunk_id", record.key.chunk_id.hex(), meta.chunk_id.hex()),
        ("kind", record.kind.name, meta.kind.name),
        ("fingerprint", record.fingerprint.hex(), meta.fingerprint.hex()),
        ("num_tokens", record.num_tokens, meta.num_tokens),
    ):
        _require(announced == found, f"info.{field}", f"{found}, as the object says", announced)


def _require(ok: bool, field: str, limit: str, actual: object) -> None:
    if not ok:
        raise InvalidRequest(f"{field} must be {limit}, got {actual}", field=field, limit=limit, actual=str(actual))
