"""What a file of the disk tier says of itself: enough to list it again when the index is lost."""

from __future__ import annotations

from pathlib import Path

from spolia_core.chunk_object import head_bytes, parse_head
from spolia_core.digests import FRAME_BYTES, digest
from spolia_core.errors import DataCorrupt
from spolia_kvstore.object_file import ObjectFile
from spolia_kvstore.objects import ObjectKey, ObjectRecord
from spolia_kvstore.verify import ObjectVerifier


def record_of_file(path: Path, key: ObjectKey) -> tuple[ObjectRecord, tuple[bytes, ...]]:
    """Reads and checks a whole file; its record and the digests of its frames.

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
        data = [file.read(offset, min(offset + FRAME_BYTES, size)) for offset in range(0, size, FRAME_BYTES)]
    finally:
        file.close()
    record = ObjectRecord(
        key=key,
        kind=head.meta.kind,
        format_version=head.meta.format_version,
        codec=head.meta.codec,
        fingerprint=head.meta.fingerprint,
        num_tokens=head.meta.num_tokens,
        size_bytes=size,
        digest=digest(b"".join(data)),
        replica=f"found/{path.stem[-16:]}",
    )
    verifier = ObjectVerifier(record)
    for piece in data:
        verifier.feed(piece)
    verifier.finish()
    return record, verifier.frame_digests
