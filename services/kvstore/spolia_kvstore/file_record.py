"""What a file of the disk tier says of itself: enough to list it again when the index is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash

from spolia_core.chunk_object import head_bytes, parse_head
from spolia_core.digests import FRAME_BYTES
from spolia_core.errors import DataCorrupt
from spolia_kvstore.object_file import ObjectFile
from spolia_kvstore.objects import ObjectKey, ObjectRecord
from spolia_kvstore.verify import ObjectVerifier


def record_of_file(path: Path, key: ObjectKey) -> tuple[ObjectRecord, tuple[bytes, ...]]:
    """Reads and checks a whole file; its record and the digests of its frames. Holds a frame of it at a time.

    Raises `OSError`, or `SpoliaError` for one that is damaged, of an unknown format, or of another chunk than its name
    says.
    """
    size = path.stat().st_size
    file = ObjectFile(path, size)
    try:
        start = file.read(0, min(8, size))
        head = parse_head(file.read(0, head_bytes(start, size)), size)
        if head.meta.chunk_id != key.chunk_id:
            raise DataCorrupt(f"the file of chunk {key.chunk_id.hex()} holds {head.meta.chunk_id.hex()}")
        record = ObjectRecord(
            key=key,
            kind=head.meta.kind,
            format_version=head.meta.format_version,
            codec=head.meta.codec,
            fingerprint=head.meta.fingerprint,
            num_tokens=head.meta.num_tokens,
            size_bytes=size,
            digest=_digest_of(file),
            replica=f"found/{path.stem[-16:]}",
        )
        verifier = ObjectVerifier(record)
        for piece in _pieces_of(file):  # once more: a verifier wants the digest of the whole first
            verifier.feed(piece)
        verifier.finish()
    finally:
        file.close()
    return record, verifier.frame_digests


def _digest_of(file: ObjectFile) -> bytes:
    whole = xxhash.xxh3_128()
    for piece in _pieces_of(file):
        whole.update(piece)
    return whole.digest()


def _pieces_of(file: ObjectFile) -> Iterator[bytes]:
    for start in range(0, file.size, FRAME_BYTES):
        yield file.read(start, start + FRAME_BYTES)
