"""What an upload must be before anybody may read it, and what a stored object must still be when it is read again."""

from __future__ import annotations

import math

import xxhash

from spolia_core.chunk_object import RAW_CODEC, ChunkHead, ChunkMeta, check_layer, head_bytes, parse_head
from spolia_core.digests import FRAME_BYTES, MAX_FRAME_BYTES, check_digest, check_digest_of
from spolia_core.errors import DataCorrupt, InvalidRequest, NotSupported, SpoliaError
from spolia_core.field_checks import check_field
from spolia_core.ids import FORMAT_VERSION
from spolia_kvstore.objects import ObjectRecord

KNOWN_CODECS = frozenset({RAW_CODEC})


def check_record(record: ObjectRecord, max_object_bytes: int) -> None:
    """Raises `InvalidRequest`, naming the field, for an object this release cannot keep."""
    check_field(
        record.format_version == FORMAT_VERSION, "info.format_version", str(FORMAT_VERSION), record.format_version
    )
    check_field(record.codec in KNOWN_CODECS, "info.codec", repr(RAW_CODEC), repr(record.codec))
    check_field(record.num_tokens >= 1, "info.num_tokens", "≥ 1", record.num_tokens)
    check_field(
        1 <= record.size_bytes <= max_object_bytes,
        "info.size_bytes",
        f"1 … {max_object_bytes} bytes",
        record.size_bytes,
    )
    check_field(
        math.isfinite(record.compute_s) and record.compute_s >= 0, "info.compute_s", "≥ 0 seconds", record.compute_s
    )


def check_frame(
    record: ObjectRecord, num_received: int, offset: int, data: bytes | memoryview, frame_digest: bytes
) -> None:
    """Raises `InvalidRequest` for a frame out of order or of wrong length, `DataCorrupt` for one that was damaged."""
    check_field(offset == num_received, "frame.offset", str(num_received), offset)
    check_field(1 <= len(data) <= MAX_FRAME_BYTES, "frame.data", f"1 … {MAX_FRAME_BYTES} bytes", len(data))
    end = offset + len(data)
    check_field(end <= record.size_bytes, "frame.data", f"{record.size_bytes} bytes in all, as announced", end)
    check_digest(data, frame_digest, f"frame at {offset} of chunk {record.key.chunk_id.hex()}")


def check_complete(record: ObjectRecord, num_received: int) -> None:
    """Raises `InvalidRequest` when the upload ended before its announced length."""
    limit = f"{record.size_bytes} bytes, as announced"
    check_field(num_received == record.size_bytes, "info.size_bytes", limit, num_received)


class ObjectVerifier:
    """Checks an object's bytes as they pass, in order: whole digest, head, layer digests.

    Each byte is hashed three times, for the whole, its frame and its layer, while it is in cache. On arrival
    and on load alike. What is wrong is raised by `finish`, since only then is it known whether bytes were damaged
    (`DataCorrupt`) or are not the object that was announced (`InvalidRequest`).
    """

    def __init__(self, record: ObjectRecord) -> None:
        self._record = record
        self._whole = xxhash.xxh3_128()
        self._frame = xxhash.xxh3_128()
        self._layer = xxhash.xxh3_128()
        self._start = bytearray()
        self._head: ChunkHead | None = None
        self._problem: SpoliaError | None = None
        self._num_seen = 0
        self._frame_digests: list[bytes] = []
        self._num_layers_seen = 0
        self._into_layer = 0

    @property
    def frame_digests(self) -> tuple[bytes, ...]:
        """Digests of the object's pieces of `FRAME_BYTES`, once all were fed."""
        return tuple(self._frame_digests)

    @property
    def head(self) -> ChunkHead:
        """The head, after `finish`."""
        assert self._head is not None
        return self._head

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes the next bytes; never raises for what they are."""
        view = memoryview(data)
        self._whole.update(view)
        self._feed_frames(view)
        if self._problem is None:
            try:
                self._feed_object(view)
            except SpoliaError as error:
                self._problem = error
        self._num_seen += len(view)

    def finish(self) -> None:
        """Raises `DataCorrupt` for damage, `InvalidRequest` for bytes that are not the object that was announced."""
        check_digest_of(self._whole.digest(), self._record.digest, f"chunk object {self._record.key.chunk_id.hex()}")
        if self._head is None:
            raise _unreadable(self._problem or DataCorrupt("chunk object has no readable header", field="header"))
        _check_metadata(self._record, self._head.meta)
        if self._problem is not None:
            raise self._problem

    def _feed_frames(self, view: memoryview) -> None:
        """Cuts at multiples of `FRAME_BYTES`, however the bytes come."""
        offset = 0
        while offset < len(view):
            into_frame = (self._num_seen + offset) % FRAME_BYTES
            piece = view[offset : offset + FRAME_BYTES - into_frame]
            self._frame.update(piece)
            offset += len(piece)
            position = self._num_seen + offset
            if position % FRAME_BYTES == 0 or position == self._record.size_bytes:
                self._frame_digests.append(self._frame.digest())
                self._frame.reset()

    def _feed_object(self, view: memoryview) -> None:
        if self._head is None:
            view = self._feed_head(view)
        if self._head is not None:
            self._feed_layers(self._head, view)

    def _feed_head(self, view: memoryview) -> memoryview:
        """Collects the head; what of `view` comes after it."""
        self._start += view
        if len(self._start) < 8:
            return view[:0]
        size = head_bytes(self._start, self._record.size_bytes)
        if len(self._start) < size:
            return view[:0]
        rest = len(self._start) - size
        self._head = parse_head(self._start[:size], self._record.size_bytes)
        self._start = bytearray()
        return view[len(view) - rest :]

    def _feed_layers(self, head: ChunkHead, view: memoryview) -> None:
        layer_bytes = head.meta.shape.layer_bytes(head.meta.num_tokens)
        offset = 0
        while offset < len(view):
            piece = view[offset : offset + layer_bytes - self._into_layer]
            self._layer.update(piece)
            offset += len(piece)
            self._into_layer += len(piece)
            if self._into_layer == layer_bytes:
                check_layer(head, self._num_layers_seen, self._layer.digest())
                self._layer.reset()
                self._num_layers_seen += 1
                self._into_layer = 0


def _unreadable(error: SpoliaError) -> SpoliaError:
    if isinstance(error, DataCorrupt | NotSupported):
        return InvalidRequest(f"unreadable chunk object: {error}", field=f"object.{error.field}")
    return error


def _check_metadata(record: ObjectRecord, meta: ChunkMeta) -> None:
    for field, announced, found in (
        ("chunk_id", record.key.chunk_id.hex(), meta.chunk_id.hex()),
        ("kind", record.kind.name, meta.kind.name),
        ("fingerprint", record.fingerprint.hex(), meta.fingerprint.hex()),
        ("num_tokens", record.num_tokens, meta.num_tokens),
    ):
        check_field(announced == found, f"info.{field}", f"{found}, as the object says", announced)
