"""Objects as they come from one store: frames put together, every byte checked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import xxhash

from spolia.v1.common_pb2 import ObjectInfo
from spolia.v1.kvstore_pb2 import GetHeader, LookupEntry
from spolia_core.digests import digest
from spolia_core.errors import DataCorrupt
from spolia_core.reuse import MissReason
from spolia_node.frame_messages import GetCall, ReceivedFrame, read_get


@dataclass(frozen=True, slots=True)
class FetchedChunk:
    """One chunk of a Get: its checked bytes, which the caller owns, or why it is missed.

    `data` is None for a miss, and where the bytes went to an `OnBytes`. `index` counts in the ids asked for. After a
    DIGEST miss `entry.info` still says what was announced.
    """

    index: int
    chunk_id: bytes
    entry: LookupEntry
    data: bytearray | None
    miss: MissReason | None

    def __post_init__(self) -> None:
        assert self.data is None or self.miss is None


OnBytes = Callable[[int, ObjectInfo, int, memoryview], None]
"""Takes an object as it comes: its index in the Get, what was announced, where the next bytes belong, and the bytes,
whose frame was checked and which are good during the call only. The first call for an object has none; the same index
may begin anew, at another replica, whose bytes need not be those of the first."""


async def fetched(
    call: GetCall, ids: Sequence[bytes], on_bytes: Callable[[ObjectInfo, int, memoryview], None] | None = None
) -> AsyncGenerator[FetchedChunk, None]:
    """One item per id, in order, each as soon as it is whole. Leaves the call to the caller.

    The bytes of the object that is due go to `on_bytes`, where there is one, and nowhere else. Bytes that do not match
    a digest, an offset or the announced length are a DIGEST miss; the others go on. Raises `DataCorrupt` for an answer
    to another question, and for one that is none.
    """
    arrival: _Arrival | None = None
    num_headers = 0
    async for message in call:
        received = read_get(message)
        if isinstance(received, ReceivedFrame):
            if arrival is None:
                raise DataCorrupt("the store sent a frame that belongs to no object")
            arrival.take(received)
        else:
            if arrival is not None:
                yield arrival.finished()  # cut short
            index = _checked_index(received, num_headers, len(ids))
            num_headers += 1
            arrival = _Arrival(received, ids[index], on_bytes) if received.entry.HasField("info") else None
            if arrival is None:
                yield _missed(received, ids[index])
        if arrival is not None and arrival.is_whole:
            yield arrival.finished()
            arrival = None
    if arrival is not None:
        yield arrival.finished()
    if num_headers != len(ids):
        raise DataCorrupt(f"the store answered {num_headers} of {len(ids)} chunks")


class _Arrival:
    """An object on its way in. Keeps taking frames after damage, so that the objects behind it are still read."""

    def __init__(
        self, header: GetHeader, chunk_id: bytes, on_bytes: Callable[[ObjectInfo, int, memoryview], None] | None
    ) -> None:
        info = header.entry.info
        self._header = header
        self._info = info
        self._chunk_id = chunk_id
        self._on_bytes = on_bytes
        self._is_intact = info.chunk_id == chunk_id
        self._num_received = 0
        self._whole = xxhash.xxh3_128()
        self._data: bytearray | None = None
        if on_bytes is None:
            try:
                self._data = bytearray(info.size_bytes)
            except (MemoryError, OverflowError):
                self._is_intact = False  # no object is that large
        elif self._is_intact:
            on_bytes(info, 0, memoryview(b""))

    @property
    def is_whole(self) -> bool:
        """Whether every announced byte has come, undamaged as far as frames tell."""
        return self._is_intact and self._num_received == self._info.size_bytes

    def take(self, frame: ReceivedFrame) -> None:
        """Hands a frame on, or notes that the object is damaged."""
        start, end = self._num_received, self._num_received + len(frame.data)
        fits = self._is_intact and frame.offset == start and end <= self._info.size_bytes
        if not fits or digest(frame.data) != frame.digest:
            self._is_intact = False
            return
        self._whole.update(frame.data)  # while it is in cache
        self._num_received = end
        if self._data is not None:
            memoryview(self._data)[start:end] = frame.data
        elif self._on_bytes is not None:
            self._on_bytes(self._info, start, frame.data)

    def finished(self) -> FetchedChunk:
        """The chunk, whole and checked, or a miss."""
        index, entry = self._header.index, self._header.entry
        if self.is_whole and self._whole.digest() == self._info.digest:
            return FetchedChunk(index, self._chunk_id, entry, self._data, None)
        return FetchedChunk(index, self._chunk_id, entry, None, MissReason.DIGEST)


def _checked_index(header: GetHeader, expected: int, num_ids: int) -> int:
    if header.index != expected or expected >= num_ids:
        raise DataCorrupt(f"the store answered chunk {header.index} where {expected} of {num_ids} was due")
    return expected


def _missed(header: GetHeader, chunk_id: bytes) -> FetchedChunk:
    reasons = {reason.value for reason in MissReason}
    reason = MissReason(header.entry.miss) if header.entry.miss in reasons else MissReason.NOT_FOUND
    return FetchedChunk(header.index, chunk_id, header.entry, None, reason)
