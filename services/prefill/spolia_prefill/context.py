"""Prefills exact contexts: reuse what is here or stored, compute the rest in slices, hand live KV off as it is made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from spolia.v1.prefill_pb2 import PrefillResponse
from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_engine.steps import Steps
from spolia_node.deadline import Deadline
from spolia_prefill.handed_pass import PassRunner, PassToHand
from spolia_prefill.handoff import Acknowledgements, LayerStream
from spolia_prefill.progress import Progress
from spolia_prefill.work import ContextJob
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.engine_thread import EngineThread


class ContextPrefiller:
    """Runs context jobs on one engine."""

    def __init__(
        self, core: EngineCore, thread: EngineThread, fetcher: ChunkFetcher, store_share: float, slice_tokens: int
    ) -> None:
        """`store_share` is the part of a job's time that may be spent fetching its prefix from the store."""
        self._core = core
        self._fetcher = fetcher
        self._store_share = store_share
        self._slice_tokens = slice_tokens
        self._passes = PassRunner(core, thread)

    async def run(
        self, job: ContextJob, acks: Acknowledgements, progress: Progress, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        """As `PassRunner.run`."""
        prefix = await self._prefix(job, deadline)
        num_cached = len(prefix) * PREFIX_CHUNK_TOKENS
        num_rows = len(job.token_ids) - num_cached
        progress.computed(0, num_cached - job.num_cached_tokens)
        layers = LayerStream(
            self._core.pool,
            prefix,
            len(job.token_ids),
            job.num_cached_tokens,
            self._slice_tokens if job.accepts_slices else None,
        )
        work = PassToHand(
            self._prefill(job, prefix, layers),
            prefix,
            layers,
            EngineJob(job.tenant_id, num_rows, WorkKind.CONTEXT),
            num_cached,
        )
        async with aclosing(self._passes.run(work, acks, progress, deadline)) as responses:
            async for response in responses:
                yield response

    async def _prefix(self, job: ContextJob, deadline: Deadline) -> list[Run]:
        """Runs of leading prefix chunks: resident ones as far as they go, then stored ones the caller has too.

        At least one token is left to compute. Blocks from `num_cached_tokens` on are new to the caller; were they
        stored it would have said so, hence only resident ones are looked for there.
        """
        usable = job.chain[: (len(job.token_ids) - 1) // PREFIX_CHUNK_TOKENS]
        prefix = self._core.acquire_prefix(usable)
        wanted = usable[len(prefix) : job.num_cached_tokens // PREFIX_CHUNK_TOKENS]
        if wanted:
            try:
                fetched = await self._fetcher.fetch_prefix(
                    job.tenant_id,
                    prefix_blocks(usable[: len(prefix) + len(wanted)], len(prefix)),
                    deadline.share(self._store_share),
                )
            except BaseException:
                release_runs(self._core.pool, prefix)
                raise
            prefix += fetched.runs.values()
        return prefix

    def _prefill(self, job: ContextJob, prefix: Sequence[Run], layers: LayerStream) -> Steps[Context]:
        """For the engine's thread. Takes the prefix's references, once it has begun."""
        options = PassOptions(slice_tokens=self._slice_tokens, on_layer=layers.layer_done, joins=True)
        context = yield from self._core.exact_context_steps(job.token_ids, prefix, options)
        try:
            self._core.register_prefix(context, job.chain)
        except BaseException:
            context.close()
            raise
        return context
