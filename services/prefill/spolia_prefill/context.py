"""Prefills exact contexts: reuse what is here or stored, compute the rest, hand live KV off as it is made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from spolia.v1.prefill_pb2 import FirstToken, PrefillDone, PrefillResponse
from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_engine.context import Context, release_runs
from spolia_engine.core import EngineCore
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_engine.steps import finish
from spolia_node.deadline import Deadline
from spolia_prefill.handoff import Acknowledgements, LayerStream
from spolia_prefill.work import ContextJob
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.engine_thread import EngineThread


@dataclass(frozen=True, slots=True)
class _Prefilled:
    context: Context
    token_id: int
    compute_s: float


class ContextPrefiller:
    """Runs context jobs on one engine."""

    def __init__(self, core: EngineCore, thread: EngineThread, fetcher: ChunkFetcher, store_share: float) -> None:
        """`store_share` is the part of a job's time that may be spent fetching its prefix from the store."""
        self._core = core
        self._thread = thread
        self._fetcher = fetcher
        self._store_share = store_share

    async def run(
        self, job: ContextJob, acks: Acknowledgements, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        """Yields the live KV's header, its layers as they are computed, the token after the context, and the end.

        The context's memory is held until the caller has acknowledged every layer or stopped doing so.
        """
        prefix = await self._prefix(job, deadline)
        num_cached = len(prefix) * PREFIX_CHUNK_TOKENS
        layers = LayerStream(
            self._core.adapter.kv_shape, job.num_cached_tokens, len(job.token_ids) - job.num_cached_tokens
        )
        working = self._thread.submit(
            lambda: self._prefill(job, prefix, layers),
            discard=lambda prefilled: prefilled.context.close(),
            skip=lambda: release_runs(self._core.pool, prefix),
        )
        try:
            yield layers.header()
            async for response in layers.frames(working):
                yield response
            prefilled = await working
            yield PrefillResponse(first_token=FirstToken(token_id=prefilled.token_id))
            yield PrefillResponse(
                done=PrefillDone(
                    num_computed_tokens=prefilled.context.num_computed_tokens,
                    num_cached_tokens=num_cached,
                    compute_ms=prefilled.compute_s * 1000,
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

    def _prefill(self, job: ContextJob, prefix: Sequence[Run], layers: LayerStream) -> _Prefilled:
        """Runs in the engine's thread. Takes the prefix's references."""
        started = time.monotonic()
        runs: list[Run] = []

        def on_layer(live: Run, layer: int) -> None:
            if not runs:
                runs.extend(_from_position([*prefix, live], job.num_cached_tokens))
            layers.layer_done(layer, runs)

        context = finish(self._core.exact_context_steps(job.token_ids, prefix, PassOptions(on_layer=on_layer)))
        try:
            self._core.register_prefix(context, job.chain)
            token_id = self._core.first_token(context, job.sampling, job.token_index)
        except BaseException:
            context.close()
            raise
        return _Prefilled(context, token_id, time.monotonic() - started)


def _from_position(runs: Sequence[Run], position: int) -> list[Run]:
    """What `runs`, absolute and without gaps, hold from `position` on."""
    found: list[Run] = []
    for run in runs:
        skipped = max(0, position - run.rope_base)
        if skipped < run.num_tokens:
            found.append(Run(run.extent, run.start + skipped, run.num_tokens - skipped, run.rope_base + skipped))
    return found


def _close(working: asyncio.Future[_Prefilled]) -> None:
    """Frees the pass's context. One that is under way or never began is freed by the engine's thread."""
    if not working.cancel() and not working.cancelled() and working.exception() is None:
        working.result().context.close()
