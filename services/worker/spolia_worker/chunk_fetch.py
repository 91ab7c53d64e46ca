"""Chunks from the store into the pool."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate

from spolia.v1.common_pb2 import ObjectInfo, Tier
from spolia.v1.kvstore_pb2 import LookupEntry
from spolia_core.chunk_object import RAW_CODEC, ParsedChunk, parse_chunk_object
from spolia_core.errors import Busy, DataCorrupt, DeadlineExceeded, NotSupported, SpoliaError
from spolia_core.reuse import ChunkKind, MissReason, TokenSource
from spolia_engine.core import EngineCore
from spolia_engine.kv_bytes import write_object
from spolia_engine.run import Run
from spolia_engine.sealing import SealedBlock
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.store_client import StoreClient
from spolia_node.store_stream import FetchedChunk, OnBytes
from spolia_node.tracing import span
from spolia_worker.arriving import ArrivingChunk, ChunkLost

ACCEPTED_CODECS = (RAW_CODEC,)
"""Codecs this release can attend to. EXACT may use the lossless ones only; raw is."""

log = get_log(__name__)


@dataclass(slots=True)
class Fetched:
    """What came of a fetch. Each run carries a reference; `misses` says why the others did not come."""

    runs: dict[bytes, Run] = field(default_factory=dict)
    sources: dict[bytes, TokenSource] = field(default_factory=dict)
    misses: dict[bytes, MissReason] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Received:
    """What came of one chunk's fetch: the bytes that moved, and why it is a miss; None where it came."""

    num_bytes: int
    miss: MissReason | None


class ChunkFetcher:
    """Fetches chunks of one model. Late, lost or corrupt chunks are misses with a reason, never errors.

    `Busy` is raised when the pool has no room: that is the request's failure, not the store's, which never says Busy to
    a reader.
    """

    def __init__(self, core: EngineCore, store: StoreClient) -> None:
        self._core = core
        self._store = store

    async def fetch_arriving(
        self, tenant_id: str, chunk: ArrivingChunk, deadline: Deadline, on_layer: Callable[[], None]
    ) -> Received:
        """Takes one local chunk from the store into its extent, and registers it when all of it is there.

        `on_layer` is called whenever layers became whole. A chunk that does not come is failed, and says why.
        """
        num_bytes, is_whole, miss, error = 0, False, None, None

        def on_bytes(index: int, info: ObjectInfo, offset: int, data: memoryview) -> None:
            nonlocal num_bytes
            num_bytes = max(num_bytes, offset + len(data))  # also of what breaks off
            if chunk.take(info, offset, data):
                on_layer()
            if chunk.failure is not None:
                raise ChunkLost(chunk.failure.message)  # the rest of it is not worth having

        try:
            async with self._get(tenant_id, [chunk.chunk_id], deadline, on_bytes) as found:
                async for item in found:
                    miss, is_whole = item.miss, item.miss is None
        except SpoliaError as caught:
            miss, error = reason_of(caught), caught
        if is_whole and chunk.is_complete:
            chunk.arrive()  # whatever became of the stream behind its last byte
            return Received(num_bytes, None)
        if chunk.failure is not None:
            miss = reason_of(chunk.failure)
        elif is_whole:
            miss = MissReason.DIGEST  # what was announced came, and there is no chunk in it
        assert miss is not None, "a fetch that brings nothing says why"
        if miss is MissReason.DIGEST:
            log.warning("chunk damaged on arrival", chunk_id=chunk.chunk_id.hex(), error=str(chunk.failure or ""))
        chunk.fail(error or DataCorrupt(f"a store has it no longer whole: {miss.name}"))
        return Received(num_bytes, miss)

    async def fetch_prefix(self, tenant_id: str, blocks: Sequence[SealedBlock], deadline: Deadline) -> Fetched:
        """The longest stored beginning of a chain of chunks at their own positions, into one extent, registered.

        The extent holds the chunks alone, one behind the other, whatever lies between them in the context.
        """
        result, chain = Fetched(), [block.chunk_id for block in blocks]
        with span("fetch", num_chunks=len(blocks), kind=blocks[0].kind.name.lower() if blocks else "") as fetching:
            try:
                entries = await self._store.lookup(
                    tenant_id, chain, self._core.adapter.fingerprint, ACCEPTED_CODECS, deadline
                )
                num_stored = _num_leading(chain, entries, result)
                if num_stored:
                    await self._get_prefix(tenant_id, blocks[:num_stored], deadline, result)
            except BaseException as error:
                if not _is_miss(error):
                    self.release(result)
                    raise
                _fill(result, chain, reason_of(error))
            fetching.set(num_bytes=result.num_bytes, num_hits=len(result.runs))
        return result

    def release(self, fetched: Fetched) -> None:
        """Gives the references of fetched runs back."""
        for run in fetched.runs.values():
            self._core.pool.release(run.extent)
        fetched.runs.clear()

    async def _get_prefix(
        self, tenant_id: str, blocks: Sequence[SealedBlock], deadline: Deadline, result: Fetched
    ) -> None:
        pool, ids = self._core.pool, [block.chunk_id for block in blocks]
        starts = [0, *accumulate(block.num_tokens for block in blocks)]
        extent = pool.allocate(starts[-1], in_transfer=True)
        try:
            async with self._get(tenant_id, ids, deadline) as chunks:
                async for chunk in chunks:
                    block = blocks[chunk.index]
                    parsed = self._open(chunk, block, result)
                    if parsed is None:
                        # What stands behind a lost chunk is of no use: lost for the same reason.
                        _fill(result, ids, result.misses[chunk.chunk_id])
                        break
                    start = starts[chunk.index]
                    write_object(extent, start, parsed, self._core.adapter.kv_shape)
                    result.runs[chunk.chunk_id] = Run(extent, start, block.num_tokens, block.position)
        finally:
            # Runs that came whole are good whatever ended the stream.
            if result.runs:
                pool.arrive(extent)
                for chunk_id, run in result.runs.items():
                    pool.retain(extent)
                    self._core.resident.register(chunk_id, blocks[0].kind, run)
            pool.release(extent)

    def _get(
        self, tenant_id: str, ids: Sequence[bytes], deadline: Deadline, on_bytes: OnBytes | None = None
    ) -> aclosing[AsyncGenerator[FetchedChunk, None]]:
        fingerprint = self._core.adapter.fingerprint
        return aclosing(self._store.get(tenant_id, ids, fingerprint, ACCEPTED_CODECS, deadline, on_bytes=on_bytes))

    def _open(self, chunk: FetchedChunk, block: SealedBlock, result: Fetched) -> ParsedChunk | None:
        """The chunk, when it is what was asked for; its bytes are verified against their digest by the client."""
        if chunk.miss is not None:
            if chunk.miss is MissReason.DIGEST:
                log.warning("chunk damaged on arrival", chunk_id=chunk.chunk_id.hex())
            result.misses[chunk.chunk_id] = chunk.miss
            return None
        assert chunk.data is not None, "nothing else takes its bytes"
        result.num_bytes += len(chunk.data)
        try:
            parsed = parse_chunk_object(chunk.data, verify=False)
            shape = self._core.adapter.kv_shape
            wanted = (chunk.chunk_id, block.kind, block.num_tokens, block.position, shape)
            meta = parsed.meta
            if (meta.chunk_id, meta.kind, meta.num_tokens, meta.rope_base, meta.shape) != wanted:
                raise DataCorrupt(f"object is {meta}, not chunk {chunk.chunk_id.hex()}")
        except (DataCorrupt, NotSupported) as error:
            log.warning("chunk dropped", chunk_id=chunk.chunk_id.hex(), error=str(error))
            result.misses[chunk.chunk_id] = reason_of(error)
            return None
        result.sources[chunk.chunk_id] = source_of(chunk.entry.tier)
        return parsed


def adopt_local(core: EngineCore, parsed: ParsedChunk) -> Run:
    """Copies a local chunk into the pool and registers it; the run carries a reference. Raises `Busy`."""
    meta = parsed.meta
    extent = core.pool.allocate(meta.num_tokens, in_transfer=True)
    try:
        write_object(extent, 0, parsed, core.adapter.kv_shape)
    except BaseException:
        core.pool.release(extent)
        raise
    core.pool.arrive(extent)
    return core.adopt(extent, 0, meta.num_tokens, rope_base=0, chunk_id=meta.chunk_id, kind=ChunkKind.LOCAL)


def source_of(tier: Tier.ValueType) -> TokenSource:
    """What a report calls a tier of the store."""
    return TokenSource.DISK if tier == Tier.TIER_DISK else TokenSource.HOST


def _num_leading(chain: Sequence[bytes], entries: Sequence[LookupEntry], result: Fetched) -> int:
    """Chunks before the first that is not stored; the rest are misses: what stands behind a gap is of no use."""
    for index, entry in enumerate(entries):
        if not entry.HasField("info"):
            _fill(result, chain[index:], miss_of(entry))
            return index
    return len(chain)


def miss_of(entry: LookupEntry) -> MissReason:
    """Why it is not stored; NOT_FOUND for a reason that a newer store knows and this release does not."""
    known = {reason.value for reason in MissReason}
    return MissReason(entry.miss) if entry.miss in known else MissReason.NOT_FOUND


def _is_miss(error: BaseException) -> bool:
    return isinstance(error, SpoliaError) and not isinstance(error, Busy)


def reason_of(error: BaseException) -> MissReason:
    """What a report calls the failure of a fetch."""
    match error:
        case DataCorrupt():
            return MissReason.DIGEST
        case DeadlineExceeded():
            return MissReason.STORE_LATE
        case NotSupported(field="format_version"):
            return MissReason.FORMAT_VERSION
        case NotSupported(field="codec"):
            return MissReason.CODEC
    return MissReason.STORE_UNREACHABLE


def _fill(result: Fetched, ids: Sequence[bytes], reason: MissReason) -> None:
    for chunk_id in ids:
        if chunk_id not in result.runs:
            result.misses.setdefault(chunk_id, reason)
