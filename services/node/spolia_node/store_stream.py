"""Objects as they come from one store: frames put together, every byte checked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import grpc

from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.kvstore_pb2 import GetHeader, GetRequest, GetResponse, LookupEntry
from spolia_core.digests import digest
from spolia_core.errors import DataCorrupt
from spolia_core.reuse import MissReason

GetCall = grpc.aio.UnaryStreamCall[GetRequest, GetResponse]


@dataclass(frozen=True, slots=True)
class FetchedChunk:
    """One chunk of a Get: its checked bytes, which the caller owns, or why it is missed. Exactly one of the two is set.

    `index` counts in the ids asked for. After a DIGEST miss `entry.info` still says what was announced.
    """

    index: int
    chunk_id: bytes
    entry: LookupEntry
    data: bytearray | None
    miss: MissReason | None

    def __post_init__(self) -> None:
        assert (self.data is None) != (self.miss is None)


OnProgress = Callable[[int, ObjectInfo, bytearray, int], None]
"""Told of an object on its way: its index in the Get, what was announced, its buffer, and how many bytes from the start
have come, each frame checked. 0 says that an object begins; the same index may begin anew, at another replica, whose
bytes need not be those of the first. The buffer is good until the object is whole and may be read only."""


async def fetched(
    call: GetCall, ids: Sequence[bytes], on_progress: Callable[[ObjectInfo, bytearray, int], None] | None = None
) -> AsyncGenerator[FetchedChunk, None]:
    """One item per id, in order, each as soon as it is whole. Leaves the call to the caller.

    `on_progress` is told of the object that is due as its bytes come. Bytes that do not match a digest, an offset or
    the announced length are a DIGEST miss; the others go on. Raises `DataCorrupt` for an answer to another question.
    """
    arrival: _Arrival | None = None
    num_headers = 0
    async for response in call:
        if response.HasField("frame"):
            if arrival is None:
                raise DataCorrupt("the store sent a frame that belongs to no object")
            arrival.take(response.frame)
            if on_progress is not None:
                arrival.report(on_progress)
        else:
            if arrival is not None:
                yield arrival.finished()  # cut short
            index = _checked_index(response.header, num_headers, len(ids))
            num_headers += 1
            arrival = _Arrival(response.header, ids[index]) if response.header.entry.HasField("info") else None
            if arrival is None:
                yield _missed(response.header, ids[index])
            elif on_progress is not None:
                arrival.report(on_progress)
        if arrival is not None and arrival.is_whole:
            yield arrival.finished()
            arrival = None
    if arrival is not None:
        yield arrival.finished()
    if num_headers != len(ids):
        raise DataCorrupt(f"the store answered {num_headers} of {len(ids)} chunks")


class _Arrival:
    """An object on its way in. Keeps taking frames after damage, so that the objects behind it are still read."""

    def __init__(self, header: GetHeader, chunk_id: bytes) -> None:
        info = header.entry.info
        self._header = header
        self._chunk_id = chunk_id
        self._is_intact = info.chunk_id == chunk_id
        self._num_received = 0
        self._data = bytearray()
        try:
            self._data = bytearray(info.size_bytes)
        except (MemoryError, OverflowError):
            self._is_intact = False  # no object is that large

    @property
    def is_whole(self) -> bool:
        """Whether every announced byte has come, undamaged as far as frames tell."""
        return self._is_intact and self._num_received == len(self._data)

    def take(self, frame: Frame) -> None:
        """Copies a frame into place, or notes that the object is damaged."""
        end = self._num_received + len(frame.data)
        fits = self._is_intact and frame.offset == self._num_received and end <= len(self._data)
        if fits and digest(frame.data) == frame.digest:
            memoryview(self._data)[self._num_received : end] = frame.data
            self._num_received = end
        else:
            self._is_intact = False

    def report(self, on_progress: Callable[[ObjectInfo, bytearray, int], None]) -> None:
        """Says how far it has come; nothing of one that is damaged."""
        if self._is_intact:
            on_progress(self._header.entry.info, self._data, self._num_received)

    def finished(self) -> FetchedChunk:
        """The chunk, whole and checked, or a miss."""
        index, entry = self._header.index, self._header.entry
        if self.is_whole and digest(self._data) == entry.info.digest:
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
