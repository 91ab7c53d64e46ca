"""Prefills exact contexts: reuse what is here or stored, compute the rest in slices, hand live KV off as it is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from spolia.v1.prefill_pb2 import FirstToken, PrefillDone, PrefillResponse
from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_engine.steps import Steps
from spolia_node.deadline import Deadline
from spolia_prefill.handoff import Acknowledgements, LayerStream
from spolia_prefill.progress import Progress
from spolia_prefill.work import ContextJob
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.engine_thread import EngineThread
from spolia_worker.timed import Timed, timed_steps


@dataclass(frozen=True, slots=True)
class _Prefilled:
    context: Context
    token_id: int


class ContextPrefiller:
    """Runs context jobs on one engine."""

    def __init__(
        self, core: EngineCore, thread: EngineThread, fetcher: ChunkFetcher, store_share: float, slice_tokens: int
    ) -> None:
        """`store_share` is the part of a job's time that may be spent fetching its prefix from the store."""
        self._core = core
        self._thread = thread
        self._fetcher = fetcher
        self._store_share = store_share
        self._slice_tokens = slice_tokens

    async def run(
        self, job: ContextJob, acks: Acknowledgements, progress: Progress, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        """Yields the live KV's header, its layers as they are computed, the token after the context, and the end.

        The context's memory is held until the caller has acknowledged every layer or stopped doing so. Closing the
        generator ends the pass at its next layer, or where it stands between two slices.
        """
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
        acks.expect(layers.num_slices, self._core.adapter.num_layers)
        working = self._thread.submit_steps(
            progress.following(0, timed_steps(self._prefill(job, prefix, layers))),
            EngineJob(job.tenant_id, num_rows, WorkKind.CONTEXT),
            discard=lambda prefilled: prefilled.result.context.close(),
            skip=lambda: release_runs(self._core.pool, prefix),
        )
        try:
            yield layers.header()
            async for response in layers.frames(working):
                yield response
            timed = await working
            progress.finished(0)
            prefilled = timed.result
            yield PrefillResponse(first_token=FirstToken(token_id=prefilled.token_id))
            yield PrefillResponse(
                done=PrefillDone(
                    num_computed_tokens=prefilled.context.num_computed_tokens,
                    num_cached_tokens=num_cached,
                    compute_ms=timed.seconds * 1000,
                )
            )
            await deadline.wait(acks.wait_all(), "waiting for acknowledgements")
        finally:
            layers.close()
            _close(working)

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

    def _prefill(self, job: ContextJob, prefix: Sequence[Run], layers: LayerStream) -> Steps[_Prefilled]:
        """For the engine's thread. Takes the prefix's references, once it has begun."""
        options = PassOptions(slice_tokens=self._slice_tokens, on_layer=layers.layer_done)
        context = yield from self._core.exact_context_steps(job.token_ids, prefix, options)
        try:
            self._core.register_prefix(context, job.chain)
            token_id = self._core.first_token(context, job.sampling, job.token_index)
        except BaseException:
            context.close()
            raise
        return _Prefilled(context, token_id)


def _close(working: asyncio.Future[Timed[_Prefilled]]) -> None:
    """Frees the pass's context. One that is under way or never began is freed by the engine's thread."""
    if not working.cancel() and not working.cancelled() and working.exception() is None:
        working.result().result.context.close()
