"""Takes an object's bytes from a store, trusting none that were not checked."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from spolia.store_answers import miss_name, tier_name
from spolia.store_results import ObjectName
from spolia.v1 import common_pb2, kvstore_pb2
from spolia_core.errors import DataCorrupt, InternalError, InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    import xxhash

_CORRUPT = (common_pb2.MISS_REASON_DIGEST,)
_UNREADABLE = (
    common_pb2.MISS_REASON_STORE_UNREACHABLE,
    common_pb2.MISS_REASON_STORE_LATE,
    common_pb2.MISS_REASON_UNREADABLE,
)


class Received(NamedTuple):
    """An object that came whole."""

    tier: str
    size_bytes: int
    digest: bytes


def new_hasher() -> xxhash.xxh3_128:
    """What digests are taken with. Raises `InvalidRequest`, naming the extra, where it is not installed."""
    try:
        import xxhash  # the SDK alone does without
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            "downloads are checked with xxhash, which is not installed; try: pip install 'spolia[node]'",
            field="xxhash",
            limit="installed",
        ) from error
    return xxhash.xxh3_128()


def receive(
    responses: Iterable[kvstore_pb2.GetResponse], wanted: ObjectName, write: Callable[[bytes], object]
) -> Received:
    """Writes the one object that `responses` stream, in order, each frame once it was checked.

    Raises `DataCorrupt` for a frame or a whole that does not match its digest, or is not all there: what was written
    is worthless then. Raises `NotFound` or `Unavailable` when the store has no copy to give.
    """
    hasher, frame_hasher = new_hasher(), new_hasher()
    entry: kvstore_pb2.LookupEntry | None = None
    size = 0
    for response in responses:
        match response.WhichOneof("message"):
            case "header" if entry is None:
                entry = _checked_entry(response.header, wanted)
            case "frame" if entry is not None:
                frame = response.frame
                frame_hasher.reset()
                frame_hasher.update(frame.data)
                if frame.offset != size or frame_hasher.digest() != frame.digest:
                    raise _corrupt(wanted, f"the frame at byte {size} does not match its digest or its place")
                hasher.update(frame.data)
                size += len(frame.data)
                if size > entry.info.size_bytes:
                    raise _corrupt(wanted, f"more than its {entry.info.size_bytes} bytes came")
                write(frame.data)
            case _:
                raise InternalError(f"object {wanted.chunk_id.hex()}: a message came that was not due")
    if entry is None:
        raise InternalError(f"object {wanted.chunk_id.hex()}: the stream ended before its header")
    if size != entry.info.size_bytes:
        raise _corrupt(wanted, f"{size} bytes came of {entry.info.size_bytes}")
    if hasher.digest() != entry.info.digest:
        raise _corrupt(wanted, "the digest of the whole does not match")
    return Received(tier_name(entry.tier), size, entry.info.digest)


@contextmanager
def file_when_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that becomes `path` when the block ends well, and leaves nothing when it does not.

    Raises `InvalidRequest` when it cannot be written.
    """
    if path.is_dir() or not path.name:
        raise InvalidRequest(f"{path} is a folder, not a file", field="out", actual=str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}", field="out", actual=str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _checked_entry(header: kvstore_pb2.GetHeader, wanted: ObjectName) -> kvstore_pb2.LookupEntry:
    entry = header.entry
    if not entry.HasField("info"):
        raise _missed(entry.miss, wanted)
    if entry.info.chunk_id != wanted.chunk_id:
        raise InternalError(f"object {entry.info.chunk_id.hex()} came where {wanted.chunk_id.hex()} was asked for")
    return entry


def _missed(reason: int, wanted: ObjectName) -> NotFound | DataCorrupt | Unavailable:
    message = f"object {wanted.chunk_id.hex()} was not given: {miss_name(reason).replace('_', ' ')}"
    kind = DataCorrupt if reason in _CORRUPT else Unavailable if reason in _UNREADABLE else NotFound
    return kind(message, field="id", actual=wanted.chunk_id.hex())


def _corrupt(wanted: ObjectName, what: str) -> DataCorrupt:
    return DataCorrupt(f"object {wanted.chunk_id.hex()} is damaged: {what}", field="digest")
