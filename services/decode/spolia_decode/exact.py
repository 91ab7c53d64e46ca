"""EXACT: the longest prefix from memory, then from the store, the rest computed elsewhere or here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from spolia.v1.prefill_pb2 import ContextWork
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind, Miss, ReuseReport, SourceSpan, TokenSource
from spolia_decode.continuation import ExactContinuation
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_decode.prefill_client import HandedOff
from spolia_decode.prepared_context import PreparedContext
from spolia_engine.context import release_runs
from spolia_engine.extent import Extent
from spolia_engine.kv_bytes import write_layer
from spolia_engine.run import Run
from spolia_engine.sealing import prefix_blocks
from spolia_node.deadline import Deadline
from spolia_node.tracing import span
from spolia_worker.chunk_fetch import Fetched


class ExactPath:
    """Builds exact contexts."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core

    def min_blocks(self, job: GenerateJob) -> int:
        """Blocks that the context takes at least, wherever its KV comes from."""
        return self._core.pool.blocks_for(job.context.num_tokens)

    def blocks_to_take(self, job: GenerateJob) -> int:
        """Blocks that the context would take now, at most: a prefix that is here counts too."""
        return self.min_blocks(job)

    async def prepare(self, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> PreparedContext:
        """The context of a job, behind which the batch draws; fills `report`. Publishes new prefix chunks meanwhile.

        Raises `Busy` when the pool has no room, `DeadlineExceeded`.
        """
        token_ids = job.context.token_ids
        chain = list(job.ids.prefix_chain(token_ids))
        prefix = await self._prefix(job, chain[: (len(token_ids) - 1) // PREFIX_CHUNK_TOKENS], report, deadline)
        num_cached = len(prefix) * PREFIX_CHUNK_TOKENS
        report.place([SourceSpan(num_cached, job.prompt.num_tokens - num_cached, TokenSource.COMPUTED)])
        prepared = await self._hand_off(job, token_ids, prefix, report, deadline)
        if prepared is None:
            steps = self._core.exact_context_steps(token_ids, prefix, self._parts.pass_options())
            prepared = await self._parts.compute(job, steps, prefix, len(token_ids) - num_cached, deadline)
        fresh = self._core.register_prefix(prepared.context, chain)
        if self._parts.config.publish:
            self._parts.publisher.publish(
                job.tenant_id, ChunkKind.PREFIX, fresh, seconds_per_token=prepared.seconds_per_token
            )
        return replace(prepared, continuation=ExactContinuation.of(job.ids, token_ids, chain))

    async def _prefix(
        self, job: GenerateJob, chain: Sequence[bytes], report: ReuseReport, deadline: Deadline
    ) -> list[Run]:
        """Runs of the longest prefix that is here or stored, each with a reference."""
        runs = self._core.acquire_prefix(chain)
        sources = [TokenSource.DEVICE] * len(runs)
        rest = chain[len(runs) :]
        if rest:
            blocks = prefix_blocks(chain, len(runs))
            share = deadline.share(self._parts.config.store_share)
            try:
                fetched = await self._parts.fetcher.fetch_prefix(job.tenant_id, blocks, share)
            except BaseException:
                release_runs(self._core.pool, runs)
                raise
            runs += fetched.runs.values()
            sources += [fetched.sources[chunk_id] for chunk_id in fetched.runs]
            _report_fetch(report, rest, fetched)
        report.place(_prefix_spans(job, sources))
        return runs

    async def _hand_off(
        self, job: GenerateJob, token_ids: Sequence[int], prefix: Sequence[Run], report: ReuseReport, deadline: Deadline
    ) -> PreparedContext | None:
        """Has a prefill node compute what is behind `prefix`; the context takes its references.

        None when none can, or when there is so little to compute that it is done here: then they stay the caller's.
        """
        core = self._core
        num_cached = len(prefix) * PREFIX_CHUNK_TOKENS
        num_live = len(token_ids) - num_cached
        if num_live <= self._parts.config.local_prefill_tokens:
            return None
        try:
            live = core.pool.allocate(num_live, in_transfer=True)
        except BaseException:
            release_runs(core.pool, prefix)
            raise
        try:
            with span("transfer", num_tokens=num_live) as transferring:
                done = await self._parts.prefill_nodes.first_that_can(
                    job.prefill_hints,
                    deadline,
                    lambda address, share: self._prefill_at(address, job, token_ids, num_cached, live, share),
                )
                if done is not None:
                    transferring.set(node=done[0], num_bytes=done[1][0].num_bytes)
        except BaseException:
            core.pool.release(live)
            release_runs(core.pool, prefix)
            raise
        if done is None:
            core.pool.release(live)
            return None
        node_id, (handed_off, hidden) = done
        core.pool.arrive(live)
        report.live_bytes += handed_off.num_bytes
        report.nodes.append(node_id)
        context = core.arrived_context(prefix, Run(live, 0, num_live, num_cached), hidden)
        return PreparedContext(context, None, handed_off.compute_s, handed_off.seconds_per_token)

    async def _prefill_at(
        self,
        address: str,
        job: GenerateJob,
        token_ids: Sequence[int],
        num_cached: int,
        live: Extent,
        deadline: Deadline,
    ) -> tuple[HandedOff, Tensor]:
        """One node's try. What an earlier one wrote into `live` is written over."""
        work = ContextWork(token_ids=token_ids, num_cached_tokens=num_cached)
        handed_off = await self._parts.prefill.prefill(
            address,
            self._parts.start_message(job),
            work,
            self._core.adapter.kv_shape,
            lambda start, n, layer, key, value: write_layer(live, start, layer, n, key, value),
            deadline,
        )
        return handed_off, self._core.adapter.hidden_from_bytes(handed_off.last_hidden)


def _prefix_spans(job: GenerateJob, sources: Sequence[TokenSource]) -> Iterator[SourceSpan]:
    """Prefix chunks by source, as far as the prompt reaches: a replay's received tokens are not prompt."""
    for index, source in enumerate(sources):
        start = index * PREFIX_CHUNK_TOKENS
        yield SourceSpan(start, min(PREFIX_CHUNK_TOKENS, job.prompt.num_tokens - start), source)


def _report_fetch(report: ReuseReport, wanted: Sequence[bytes], fetched: Fetched) -> None:
    report.chunk_bytes += fetched.num_bytes
    report.misses += [
        Miss(chunk_id, ChunkKind.PREFIX, fetched.misses[chunk_id], PREFIX_CHUNK_TOKENS)
        for chunk_id in wanted
        if chunk_id in fetched.misses
    ]
