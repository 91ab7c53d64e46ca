"""Links for a decode node: reused chunks from memory or a store, the rows computed here, and only they handed over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from spolia.v1.prefill_pb2 import PrefillResponse
from spolia_core.errors import NotFound
from spolia_engine.context import release_runs
from spolia_engine.core import EngineCore
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sealing import SealedBlock, prefix_blocks
from spolia_node.deadline import Deadline
from spolia_prefill.handed_pass import PassRunner, PassToHand
from spolia_prefill.handoff import Acknowledgements, LayerStream
from spolia_prefill.progress import Progress
from spolia_prefill.work import LinkJob
from spolia_worker.arriving import ArrivingChunk, ChunkLost
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.engine_thread import EngineThread


@dataclass(slots=True)
class _Gathered:
    """Runs of a job, each with a reference it owns, and the chunks among them that are still arriving."""

    held: list[Run] = field(default_factory=list)
    chunks: dict[bytes, Run] = field(default_factory=dict)
    arriving: list[ArrivingChunk] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def ready(self) -> Callable[[int], bool]:
        """Whether a layer of all chunks is here, for the engine's thread. Raises `ChunkLost`."""
        arriving = tuple(self.arriving)
        return lambda layer: all(chunk.has(layer) for chunk in arriving)


class Linker:
    """Runs link jobs on one engine. What is neither here nor stored is the decode node's to bring: it looks anyway."""

    def __init__(
        self, core: EngineCore, thread: EngineThread, fetcher: ChunkFetcher, store_share: float, slice_tokens: int
    ) -> None:
        """`store_share` is the part of a job's time that may be spent fetching from the store."""
        self._core = core
        self._thread = thread
        self._fetcher = fetcher
        self._store_share = store_share
        self._slice_tokens = slice_tokens
        self._passes = PassRunner(core, thread)

    async def run(
        self, job: LinkJob, acks: Acknowledgements, progress: Progress, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        """As `PassRunner.run`. Raises `Busy` where there is no room, which is looked for before anything is fetched.

        `NotFound` where a part of the prefix, or a chunk, is missing here and in the store, or lost on its way: the
        caller links where it has it.
        """
        async with self._gathering() as gathered:
            await self._take(gathered, job, deadline)
            num_rows = len(job.plan.positions)
            layers = LayerStream(self._core.pool, [], num_rows, 0, self._slice_tokens)
            runs = {f.part_index: gathered.chunks[_chunk_of(job, f.part_index)] for f in job.plan.fragments}
            taken = [*runs.values(), *gathered.held]
            for run in taken:  # the pass has references of its own
                self._core.pool.retain(run.extent)
            options = PassOptions(
                slice_tokens=self._slice_tokens,
                joins=True,
                # Counted in rows: where they stand, the caller knows.
                on_layer=lambda run, layer: layers.layer_done(
                    Run(run.extent, run.start, run.num_tokens, run.start), layer
                ),
                ready=gathered.ready(),
            )
            work = PassToHand(
                self._core.linked_context_steps(job.prompt, runs, job.plan, gathered.held, options),
                taken,
                layers,
                EngineJob(job.tenant_id, num_rows, WorkKind.LINK),
                job.prompt.num_tokens - num_rows,
            )
            async with aclosing(self._passes.run(work, acks, progress, deadline)) as responses:
                try:
                    async for response in responses:
                        yield response
                except ChunkLost as error:
                    raise NotFound(error.message, field="link.parts") from error

    async def _take(self, gathered: _Gathered, job: LinkJob, deadline: Deadline) -> None:
        """What is here first; the rest is fetched if there is room for it and for the rows. Raises `Busy`."""
        share = deadline.share(self._store_share)
        gathered.held += self._core.acquire_prefix(job.chain)
        missing: dict[bytes, int] = {}
        for index in dict.fromkeys(f.part_index for f in job.plan.fragments):
            chunk_id = _chunk_of(job, index)
            run = None if chunk_id in gathered.chunks else self._core.resident.acquire(chunk_id)
            if run is not None:
                gathered.chunks[chunk_id] = run
            elif chunk_id not in gathered.chunks:
                missing[chunk_id] = len(job.prompt.parts[index].token_ids)
        blocks = prefix_blocks(job.chain, len(gathered.held))
        pool = self._core.pool
        lengths = [*missing.values(), *(block.num_tokens for block in blocks), len(job.plan.positions)]
        pool.check_room(sum(map(pool.blocks_for, lengths)))
        for chunk_id, num_tokens in missing.items():
            gathered.chunks[chunk_id] = self._fetch(gathered, job.tenant_id, chunk_id, num_tokens, share)
        await self._take_prefix(gathered, job, blocks, share)

    async def _take_prefix(
        self, gathered: _Gathered, job: LinkJob, missing: Sequence[SealedBlock], share: Deadline
    ) -> None:
        if not missing:
            return
        fetched = await self._fetcher.fetch_prefix(job.tenant_id, missing, share)
        gathered.held += fetched.runs.values()
        if len(gathered.held) < len(job.chain):
            raise NotFound(
                f"prefix chunk {len(gathered.held)} of {len(job.chain)} is neither here nor stored",
                field="link.num_prefix_tokens",
                actual=job.chain[len(gathered.held)].hex(),
            )

    def _fetch(self, gathered: _Gathered, tenant_id: str, chunk_id: bytes, num_tokens: int, share: Deadline) -> Run:
        """Begins to fetch a chunk; the job gets a reference on its run beside the fetch's own."""
        chunk = ArrivingChunk(self._core, chunk_id, num_tokens)
        task = asyncio.get_running_loop().create_task(self._receive(tenant_id, chunk, share), name="fetch")
        task.add_done_callback(lambda _: self._received(chunk))
        self._core.pool.retain(chunk.run.extent)
        gathered.arriving.append(chunk)
        gathered.tasks.append(task)
        return chunk.run

    async def _receive(self, tenant_id: str, chunk: ArrivingChunk, share: Deadline) -> None:
        await self._fetcher.fetch_arriving(tenant_id, chunk, share, self._thread.look_again)

    def _received(self, chunk: ArrivingChunk) -> None:
        if not chunk.is_complete:
            chunk.fail(NotFound("its fetch ended early"))
        chunk.release()
        self._thread.look_again()

    @asynccontextmanager
    async def _gathering(self) -> AsyncIterator[_Gathered]:
        """What a job holds, given back at its end."""
        gathered = _Gathered()
        try:
            yield gathered
        finally:
            for task in gathered.tasks:
                task.cancel()
            try:
                await asyncio.gather(*gathered.tasks, return_exceptions=True)
            finally:  # a second cancel, the caller's behind its deadline's, must not keep the runs
                release_runs(self._core.pool, [*gathered.held, *gathered.chunks.values()])


def _chunk_of(job: LinkJob, part_index: int) -> bytes:
    chunk_id = job.prompt.parts[part_index].chunk_id
    assert chunk_id is not None, "fragments are of chunks"
    return chunk_id
