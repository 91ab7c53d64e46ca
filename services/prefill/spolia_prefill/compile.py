"""Compiles local chunks: claim, compute once, store, or send inline where no store can carry them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.prefill_pb2 import ChunkOutcome, ChunkReady, PrefillDone, PrefillResponse
from spolia_core.digests import frames
from spolia_core.errors import SpoliaError
from spolia_core.reuse import ChunkKind
from spolia_engine.core import EngineCore
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.store_client import StoreClient
from spolia_prefill.work import CompileJob, LocalChunk
from spolia_worker.chunk_fetch import ACCEPTED_CODECS
from spolia_worker.claims import ChunkClaims, Claim, ClaimOutcome
from spolia_worker.engine_thread import EngineThread
from spolia_worker.publisher import ChunkBytes, Publisher
from spolia_worker.timed import timed

CHUNKS_AT_ONCE = 4
"""Chunks of one job that are claimed and worked on together: one computes while others are stored. With many more,
claims would lapse while their chunks wait for the engine."""

log = get_log(__name__)


class Compiler:
    """Runs compile jobs on one engine."""

    def __init__(
        self,
        core: EngineCore,
        thread: EngineThread,
        store: StoreClient,
        claims: ChunkClaims,
        publisher: Publisher,
        store_share: float,
    ) -> None:
        """`store_share` is the part of a job's time that may be spent waiting for another node's claim."""
        self._core = core
        self._thread = thread
        self._store = store
        self._claims = claims
        self._publisher = publisher
        self._store_share = store_share

    async def run(self, job: CompileJob, deadline: Deadline) -> AsyncGenerator[PrefillResponse, None]:
        """Yields chunks as they become ready, in any order, and the end. Storing one overlaps computing the next."""
        num_computed = 0
        slots = asyncio.Semaphore(CHUNKS_AT_ONCE)
        tasks = [asyncio.create_task(self._chunk(job, chunk, slots, deadline)) for chunk in job.chunks]
        try:
            for next_done in asyncio.as_completed(tasks):
                ready, data = await next_done
                num_computed += ready.num_computed_tokens
                yield PrefillResponse(chunk=ready)
                for offset, piece, piece_digest in frames(data):
                    yield PrefillResponse(inline_frame=Frame(offset=offset, data=piece, digest=piece_digest))
            yield PrefillResponse(
                done=PrefillDone(num_computed_tokens=num_computed, num_cached_tokens=job.num_tokens - num_computed)
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _chunk(
        self, job: CompileJob, chunk: LocalChunk, slots: asyncio.Semaphore, deadline: Deadline
    ) -> tuple[ChunkReady, bytes]:
        """A chunk made ready; with bytes when it has to travel in the stream."""
        async with slots:
            if chunk.inline:
                return await self._inline(chunk)
            claim = await self._claim(job, chunk, Deadline.after(0.0), deadline)
            if claim.outcome is not ClaimOutcome.HELD:
                return await self._with_claim(job, chunk, claim, deadline)
        # Waiting for another node takes no slot.
        claim = await self._claim(job, chunk, deadline.share(self._store_share), deadline)
        with claim:
            async with slots:
                return await self._with_claim(job, chunk, claim, deadline)

    async def _claim(self, job: CompileJob, chunk: LocalChunk, waiting: Deadline, deadline: Deadline) -> Claim:
        return await self._claims.take(job.tenant_id, chunk.chunk_id, job.request_id, waiting, deadline)

    async def _with_claim(
        self, job: CompileJob, chunk: LocalChunk, claim: Claim, deadline: Deadline
    ) -> tuple[ChunkReady, bytes]:
        with claim:
            if claim.outcome is ClaimOutcome.NO_STORE:
                return await self._inline(chunk)
            if claim.outcome is ClaimOutcome.STORED:
                info = await self._stored_info(job.tenant_id, chunk, deadline)
                if info is not None:
                    return ChunkReady(outcome=ChunkOutcome.CHUNK_OUTCOME_FOUND, info=info), b""
            # Granted; or held for so long that computing it twice beats waiting; or evicted since.
            return await self._store_chunk(job.tenant_id, chunk, claim, deadline)

    async def _stored_info(self, tenant_id: str, chunk: LocalChunk, deadline: Deadline) -> ObjectInfo | None:
        """What the store has; None when it went since, or the store did."""
        try:
            entries = await self._store.lookup(
                tenant_id,
                [chunk.chunk_id],
                self._core.adapter.fingerprint,
                ACCEPTED_CODECS,
                deadline.share(self._store_share),
            )
        except SpoliaError as error:
            log.info("stored chunk not found again", chunk_id=chunk.chunk_id.hex(), error=str(error))
            return None
        return entries[0].info if entries[0].HasField("info") else None

    async def _store_chunk(
        self, tenant_id: str, chunk: LocalChunk, claim: Claim, deadline: Deadline
    ) -> tuple[ChunkReady, bytes]:
        data, num_computed = await self._object(chunk)
        ready = ChunkReady(outcome=ChunkOutcome.CHUNK_OUTCOME_STORED, info=data.info, num_computed_tokens=num_computed)
        try:
            if not await self._publisher.put(tenant_id, data, deadline.share(self._store_share), claim):
                ready.outcome = ChunkOutcome.CHUNK_OUTCOME_FOUND
            return ready, b""
        except SpoliaError as error:
            # The work is done and the caller is waiting: what the store cannot take travels in the stream.
            log.info("chunk not stored, goes inline", chunk_id=chunk.chunk_id.hex(), error=str(error))
            ready.outcome = ChunkOutcome.CHUNK_OUTCOME_INLINE
            return ready, data.data

    async def _inline(self, chunk: LocalChunk) -> tuple[ChunkReady, bytes]:
        data, num_computed = await self._object(chunk)
        outcome = ChunkOutcome.CHUNK_OUTCOME_INLINE
        return ChunkReady(outcome=outcome, info=data.info, num_computed_tokens=num_computed), data.data

    async def _object(self, chunk: LocalChunk) -> tuple[ChunkBytes, int]:
        """The chunk as bytes, and how many tokens were computed for it.

        What computing it took is said only when it was done now: nobody remembers that of a resident run.
        """
        num_computed, compute_s = 0, 0.0
        run = self._core.resident.acquire(chunk.chunk_id)
        if run is None:
            compiled = await self._thread.run(
                lambda: timed(lambda: self._core.compile(chunk.chunk_id, chunk.token_ids)),
                discard=lambda compiled: self._release(compiled.result),
            )
            run, compute_s, num_computed = compiled.result, compiled.seconds, len(chunk.token_ids)
        try:
            return await self._publisher.to_bytes(chunk.chunk_id, ChunkKind.LOCAL, run, compute_s), num_computed
        finally:
            self._release(run)

    def _release(self, run: Run) -> None:
        self._core.pool.release(run.extent)
