"""Compiles local chunks: claim, compute once and in slices, store, or send inline where no store can carry them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from spolia.v1.common_pb2 import Frame, ObjectInfo
from spolia.v1.prefill_pb2 import ChunkOutcome, ChunkReady, PrefillDone, PrefillResponse
from spolia_core.digests import frames
from spolia_core.errors import SpoliaError
from spolia_core.reuse import ChunkKind
from spolia_engine.core import EngineCore
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.store_client import StoreClient
from spolia_node.tracing import span
from spolia_prefill.progress import Progress
from spolia_prefill.work import CompileJob, LocalChunk
from spolia_worker.chunk_fetch import ACCEPTED_CODECS
from spolia_worker.claims import ChunkClaims, Claim, ClaimOutcome
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.engine_thread import EngineThread
from spolia_worker.publisher import ChunkBytes, Publisher
from spolia_worker.timed import timed_steps

CHUNKS_AT_ONCE = 4
"""Chunks of one job that are claimed and worked on together: one computes while others are stored. More would keep
claims that other nodes could be at work on."""

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class _Work:
    """A chunk of a job; the one at `index`, in the job and in its progress."""

    job: CompileJob
    chunk: LocalChunk
    progress: Progress
    index: int


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
        slice_tokens: int,
    ) -> None:
        """`store_share` is the part of a job's time that may be spent waiting for another node's claim."""
        self._core = core
        self._thread = thread
        self._store = store
        self._claims = claims
        self._publisher = publisher
        self._store_share = store_share
        self._slice_tokens = slice_tokens

    async def run(
        self, job: CompileJob, progress: Progress, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        """Yields chunks as they become ready, in any order, and the end. Storing one overlaps computing the next."""
        num_computed = 0
        slots = asyncio.Semaphore(CHUNKS_AT_ONCE)
        tasks = [
            asyncio.create_task(self._chunk(_Work(job, chunk, progress, index), slots, deadline))
            for index, chunk in enumerate(job.chunks)
        ]
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

    async def _chunk(self, work: _Work, slots: asyncio.Semaphore, deadline: Deadline) -> tuple[ChunkReady, bytes]:
        """A chunk made ready; with bytes when it has to travel in the stream."""
        try:
            return await self._made_ready(work, slots, deadline)
        finally:
            work.progress.finished(work.index)

    async def _made_ready(self, work: _Work, slots: asyncio.Semaphore, deadline: Deadline) -> tuple[ChunkReady, bytes]:
        async with slots:
            if work.chunk.inline:
                return await self._inline(work)
            claim = await self._claim(work, Deadline.after(0.0), deadline)
            if claim.outcome is not ClaimOutcome.HELD:
                return await self._with_claim(work, claim, deadline)
        # Waiting for another node takes no slot.
        claim = await self._claim(work, deadline.share(self._store_share), deadline)
        with claim:
            async with slots:
                return await self._with_claim(work, claim, deadline)

    async def _claim(self, work: _Work, waiting: Deadline, deadline: Deadline) -> Claim:
        job = work.job
        return await self._claims.take(job.tenant_id, work.chunk.chunk_id, job.request_id, waiting, deadline)

    async def _with_claim(self, work: _Work, claim: Claim, deadline: Deadline) -> tuple[ChunkReady, bytes]:
        with claim:
            if claim.outcome is ClaimOutcome.NO_STORE:
                return await self._inline(work)
            if claim.outcome is ClaimOutcome.STORED:
                info = await self._stored_info(work, deadline)
                if info is not None:
                    return ChunkReady(outcome=ChunkOutcome.CHUNK_OUTCOME_FOUND, info=info), b""
            # Granted; or held for so long that computing it twice beats waiting; or evicted since.
            return await self._store_chunk(work, claim, deadline)

    async def _stored_info(self, work: _Work, deadline: Deadline) -> ObjectInfo | None:
        """What the store has; None when it went since, or the store did."""
        try:
            entries = await self._store.lookup(
                work.job.tenant_id,
                [work.chunk.chunk_id],
                self._core.adapter.fingerprint,
                ACCEPTED_CODECS,
                deadline.share(self._store_share),
            )
        except SpoliaError as error:
            log.info("stored chunk not found again", chunk_id=work.chunk.chunk_id.hex(), error=str(error))
            return None
        return entries[0].info if entries[0].HasField("info") else None

    async def _store_chunk(self, work: _Work, claim: Claim, deadline: Deadline) -> tuple[ChunkReady, bytes]:
        data, num_computed = await self._object(work)
        ready = ChunkReady(outcome=ChunkOutcome.CHUNK_OUTCOME_STORED, info=data.info, num_computed_tokens=num_computed)
        try:
            if not await self._publisher.put(work.job.tenant_id, data, deadline.share(self._store_share), claim):
                ready.outcome = ChunkOutcome.CHUNK_OUTCOME_FOUND
            return ready, b""
        except SpoliaError as error:
            # The work is done and the caller is waiting: what the store cannot take travels in the stream.
            log.info("chunk not stored, goes inline", chunk_id=work.chunk.chunk_id.hex(), error=str(error))
            ready.outcome = ChunkOutcome.CHUNK_OUTCOME_INLINE
            return ready, data.data

    async def _inline(self, work: _Work) -> tuple[ChunkReady, bytes]:
        data, num_computed = await self._object(work)
        outcome = ChunkOutcome.CHUNK_OUTCOME_INLINE
        return ChunkReady(outcome=outcome, info=data.info, num_computed_tokens=num_computed), data.data

    async def _object(self, work: _Work) -> tuple[ChunkBytes, int]:
        """The chunk as bytes, and how many tokens were computed for it.

        What computing it took is said only when it was done now: nobody remembers that of a resident run.
        """
        chunk, num_computed, compute_s = work.chunk, 0, 0.0
        run = self._core.resident.acquire(chunk.chunk_id)
        if run is None:
            options = PassOptions(slice_tokens=self._slice_tokens, joins=True)
            steps = self._core.compile_steps(chunk.chunk_id, chunk.token_ids, options)
            num_rows = self._core.recipe.num_sink_tokens + len(chunk.token_ids)
            with span("compute", chunk_id=chunk.chunk_id.hex(), num_tokens=num_rows) as computing:
                compiled = await self._thread.run_steps(
                    work.progress.following(work.index, timed_steps(steps)),
                    EngineJob(work.job.tenant_id, num_rows, WorkKind.COMPILE),
                    discard=lambda compiled: self._release(compiled.result),
                )
                computing.set(engine_ms=compiled.seconds * 1000)
            run, compute_s, num_computed = compiled.result, compiled.seconds, len(chunk.token_ids)
        try:
            return await self._publisher.to_bytes(chunk.chunk_id, ChunkKind.LOCAL, run, compute_s), num_computed
        finally:
            self._release(run)

    def _release(self, run: Run) -> None:
        self._core.pool.release(run.extent)
