"""Chunks from the store into the pool."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from spolia.v1.common_pb2 import Tier
from spolia.v1.kvstore_pb2 import LookupEntry
from spolia_core.chunk_object import RAW_CODEC, ParsedChunk, parse_chunk_object
from spolia_core.errors import Busy, DataCorrupt, DeadlineExceeded, NotSupported, SpoliaError
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind, MissReason, TokenSource
from spolia_engine.core import EngineCore
from spolia_engine.kv_bytes import write_object
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.store_client import StoreClient
from spolia_node.store_stream import FetchedChunk

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


class ChunkFetcher:
    """Fetches chunks of one model. Late, lost or corrupt chunks are misses with a reason, never errors.

    `Busy` is raised when the pool has no room: that is the request's failure, not the store's, which never says Busy to
    a reader.
    """

    def __init__(self, core: EngineCore, store: StoreClient) -> None:
        self._core = core
        self._store = store

    async def fetch_local(self, tenant_id: str, num_tokens: dict[bytes, int], deadline: Deadline) -> Fetched:
        """Local chunks by id with their expected lengths, each into an extent of its own, registered."""
        result = Fetched()
        ids = list(num_tokens)
        try:
            async with self._get(tenant_id, ids, deadline) as chunks:
                async for chunk in chunks:
                    parsed = self._open(chunk, ChunkKind.LOCAL, num_tokens[chunk.chunk_id], 0, result)
                    if parsed is not None:
                        result.runs[chunk.chunk_id] = adopt_local(self._core, parsed)
        except BaseException as error:
            if not _is_miss(error):
                self.release(result)
                raise
            _fill(result, ids, _reason(error))
        return result

    async def fetch_prefix(self, tenant_id: str, chain: Sequence[bytes], position: int, deadline: Deadline) -> Fetched:
        """The longest stored prefix of `chain`, whose first chunk stands at `position`, into one extent, registered."""
        result = Fetched()
        try:
            entries = await self._store.lookup(
                tenant_id, list(chain), self._core.adapter.fingerprint, ACCEPTED_CODECS, deadline
            )
            ids = _leading(chain, entries, result)
            if ids:
                await self._get_prefix(tenant_id, ids, position, deadline, result)
        except BaseException as error:
            if not _is_miss(error):
                self.release(result)
                raise
            _fill(result, chain, _reason(error))
        return result

    def release(self, fetched: Fetched) -> None:
        """Gives the references of fetched runs back."""
        for run in fetched.runs.values():
            self._core.pool.release(run.extent)
        fetched.runs.clear()

    async def _get_prefix(
        self, tenant_id: str, ids: Sequence[bytes], position: int, deadline: Deadline, result: Fetched
    ) -> None:
        pool = self._core.pool
        extent = pool.allocate(len(ids) * PREFIX_CHUNK_TOKENS, in_transfer=True)
        try:
            async with self._get(tenant_id, ids, deadline) as chunks:
                async for chunk in chunks:
                    start = chunk.index * PREFIX_CHUNK_TOKENS
                    parsed = self._open(chunk, ChunkKind.PREFIX, PREFIX_CHUNK_TOKENS, position + start, result)
                    if parsed is None:
                        # What stands behind a lost chunk is of no use: lost for the same reason.
                        _fill(result, ids, result.misses[chunk.chunk_id])
                        break
                    write_object(extent, start, parsed, self._core.adapter.kv_shape)
                    result.runs[chunk.chunk_id] = Run(extent, start, PREFIX_CHUNK_TOKENS, position + start)
        finally:
            # Runs that came whole are good whatever ended the stream.
            if result.runs:
                pool.arrive(extent)
                for chunk_id, run in result.runs.items():
                    pool.retain(extent)
                    self._core.resident.register(chunk_id, ChunkKind.PREFIX, run)
            pool.release(extent)

    def _get(
        self, tenant_id: str, ids: Sequence[bytes], deadline: Deadline
    ) -> aclosing[AsyncGenerator[FetchedChunk, None]]:
        return aclosing(self._store.get(tenant_id, ids, self._core.adapter.fingerprint, ACCEPTED_CODECS, deadline))

    def _open(
        self, chunk: FetchedChunk, kind: ChunkKind, num_tokens: int, rope_base: int, result: Fetched
    ) -> ParsedChunk | None:
        """The chunk, when it is what was asked for; its bytes are verified against their digest by the client."""
        if chunk.data is None:
            if chunk.miss is MissReason.DIGEST:
                log.warning("chunk damaged on arrival", chunk_id=chunk.chunk_id.hex())
            result.misses[chunk.chunk_id] = chunk.miss or MissReason.NOT_FOUND
            return None
        result.num_bytes += len(chunk.data)
        try:
            parsed = parse_chunk_object(chunk.data, verify=False)
            wanted = (chunk.chunk_id, kind, num_tokens, rope_base, self._core.adapter.kv_shape)
            meta = parsed.meta
            if (meta.chunk_id, meta.kind, meta.num_tokens, meta.rope_base, meta.shape) != wanted:
                raise DataCorrupt(f"object is {meta}, not chunk {chunk.chunk_id.hex()}")
        except (DataCorrupt, NotSupported) as error:
            log.warning("chunk dropped", chunk_id=chunk.chunk_id.hex(), error=str(error))
            result.misses[chunk.chunk_id] = _reason(error)
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


def _leading(chain: Sequence[bytes], entries: Sequence[LookupEntry], result: Fetched) -> list[bytes]:
    """The ids before the first that is not stored; the rest are misses: what stands behind a gap is of no use."""
    num_stored = 0
    for entry in entries:
        if not entry.HasField("info"):
            _fill(result, chain[num_stored:], _miss_of(entry))
            break
        num_stored += 1
    return list(chain[:num_stored])


def _miss_of(entry: LookupEntry) -> MissReason:
    """Why it is not stored; NOT_FOUND for a reason that a newer store knows and this release does not."""
    known = {reason.value for reason in MissReason}
    return MissReason(entry.miss) if entry.miss in known else MissReason.NOT_FOUND


def _is_miss(error: BaseException) -> bool:
    return isinstance(error, SpoliaError) and not isinstance(error, Busy)


def _reason(error: BaseException) -> MissReason:
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
