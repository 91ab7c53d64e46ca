"""One object of a Get, from whichever tier has it, frame by frame, each checked before it leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from spolia_core.digests import FRAME_BYTES, digest
from spolia_core.errors import SpoliaError
from spolia_core.reuse import MissReason
from spolia_kvstore.catalog_row import Row
from spolia_kvstore.entry import Entry
from spolia_kvstore.object_file import ObjectFile
from spolia_kvstore.objects import Tier
from spolia_kvstore.ram_tier import StoredObject, Upload
from spolia_kvstore.tiers import Tiers
from spolia_kvstore.verify import ObjectVerifier
from spolia_node.logs import get_log

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class ReadFrame:
    """A part of an object: `pieces`, one behind the other, good until the next frame is asked for.

    `digest` is the one with which it arrived: where the bytes are damaged, the two differ.
    """

    offset: int
    pieces: Sequence[bytes | memoryview]
    digest: bytes


class Reading:
    """An item of a Get. `begin`, then `frames` when `entry` is no miss, then `close`, always."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    async def begin(self) -> Entry:
        """What is said of the object before its bytes; a miss, when it turns out that they cannot be had."""
        return self.entry

    async def frames(self) -> AsyncIterator[ReadFrame]:
        """The frames. Ends early when the rest cannot be read; the reader counts the bytes."""
        return
        yield

    def close(self) -> None:
        """Lets go of the object, at once: a call that ends may be cancelled more than once."""


class MemoryReading(Reading):
    """An object in memory, which stays until `close`."""

    def __init__(self, entry: Entry, tiers: Tiers, stored: StoredObject, on_damage: Callable[[], None]) -> None:
        super().__init__(entry)
        self._tiers = tiers
        self._stored = stored
        self._on_damage = on_damage
        tiers.ram.open(stored)

    async def frames(self) -> AsyncIterator[ReadFrame]:
        """Drops an object whose bytes changed in memory, so that it can be computed and stored again."""
        stored, spent = self._stored, 0.0
        for index, frame_digest in enumerate(stored.frame_digests):
            started = time.perf_counter()
            pieces = stored.frame(index)
            if not stored.is_intact(index, pieces):
                key, is_dropped = stored.record.key, self._tiers.discard(stored)
                log.warning(
                    "bytes changed in memory",
                    tenant=key.tenant_id,
                    chunk_id=key.chunk_id.hex(),
                    replica=stored.record.replica,
                    frame=index,
                    dropped=is_dropped,
                )
                self._on_damage()
            spent += time.perf_counter() - started
            yield ReadFrame(index * FRAME_BYTES, pieces, frame_digest)
        self._tiers.gate.observe(Tier.RAM, stored.size, spent)

    def close(self) -> None:
        """Ends the hold on its memory."""
        self._tiers.ram.close(self._stored)


class DiskReading(Reading):
    """An object on disk, safe from eviction until `close`; copied into memory as it is read, where that is worth it."""

    def __init__(self, entry: Entry, tiers: Tiers, row: Row, on_damage: Callable[[], None]) -> None:
        super().__init__(entry)
        assert tiers.disk is not None
        self._tiers = tiers
        self._disk = tiers.disk
        self._row = row
        self._on_damage = on_damage
        self._file: ObjectFile | None = None
        self._ahead: asyncio.Task[ReadFrame | None] | None = None
        self._upload: Upload | None = None
        self._read_s = 0.0
        self._disk.hold(row.record.key)

    async def begin(self) -> Entry:
        """Opens the file and reads its first frame, so that a disk that fails is a miss before anything is promised."""
        try:
            self._file = await self._disk.open(self._row)
        except OSError:
            self.entry = Entry(miss=MissReason.UNREADABLE)
            return self.entry
        self._read_ahead(0)
        if await self._next() is None:
            self.entry = Entry(miss=MissReason.UNREADABLE)
        return self.entry

    async def frames(self) -> AsyncIterator[ReadFrame]:
        """Reads a frame while the one before it is sent. Quarantines a file that is damaged or cannot be read."""
        self._upload = self._tiers.promote(self._row)
        verifier = ObjectVerifier(self._row.record) if self._upload is None else self._upload.verifier
        num_frames = len(self._row.frame_digests)
        for index in range(num_frames):
            frame = await self._next()
            if frame is None:
                return
            if index + 1 < num_frames:
                self._read_ahead(index + 1)
            (data,) = frame.pieces  # as it was read from the file
            if digest(data) != frame.digest:
                self._on_damage()
                await self._disk.take_out(self._row, f"digest of frame {index} does not match")
                yield frame
                return
            if self._upload is None:
                verifier.feed(data)
            else:
                self._tiers.ram.append(self._upload, data)
            yield frame
        self._tiers.gate.observe(Tier.DISK, self._row.record.size_bytes, self._read_s)
        await self._finish(verifier)

    def close(self) -> None:
        """Gives back the hold and memory that was not filled; the file, once no thread reads it any more."""
        if self._upload is not None:
            self._tiers.ram.abort(self._upload)
        self._disk.release(self._row.record.key)
        file, self._file = self._file, None
        if file is None:
            return
        if self._ahead is not None and not self._ahead.done():
            self._ahead.add_done_callback(lambda _: file.close())
        else:
            file.close()

    def _read_ahead(self, index: int) -> None:
        self._ahead = asyncio.get_running_loop().create_task(self._read(index), name="read-frame")

    async def _next(self) -> ReadFrame | None:
        """The frame that was asked for last."""
        assert self._ahead is not None
        return await asyncio.shield(self._ahead)

    async def _read(self, index: int) -> ReadFrame | None:
        start = index * FRAME_BYTES
        end = min(start + FRAME_BYTES, self._row.record.size_bytes)
        file = self._file
        assert file is not None
        started = time.perf_counter()
        try:
            data = await self._disk.in_thread(lambda: file.read(start, end))
        except OSError as error:
            await self._disk.note_read_error(self._row, error)
            return None
        self._read_s += time.perf_counter() - started
        return ReadFrame(start, (data,), self._row.frame_digests[index])

    async def _finish(self, verifier: ObjectVerifier) -> None:
        """Checks layers and the whole, and lets the copy in memory be found."""
        try:
            verifier.finish()
        except SpoliaError as error:
            self._on_damage()
            await self._disk.take_out(self._row, error.message)
            return
        if self._upload is not None:
            upload, self._upload = self._upload, None
            self._tiers.commit_promoted(upload, self._row)
