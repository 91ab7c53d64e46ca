"""EXACT: the longest prefix from memory, then from the store, the rest computed elsewhere or here."""

from __future__ import annotations

from collections.abc import Sequence

from spolia.v1.prefill_pb2 import ContextWork, PrefillStart
from spolia_core.reuse import PREFIX_CHUNK_TOKENS, ChunkKind, Miss, ReuseReport, TokenSource
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_decode.prefill_client import HandedOff
from spolia_decode.prepared import Prepared
from spolia_engine.context import release_runs
from spolia_engine.kv_bytes import write_layer
from spolia_engine.pool import Extent
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.rpc_messages import sampling_to_pb
from spolia_worker.chunk_fetch import ACCEPTED_CODECS, Fetched


class ExactPath:
    """Builds exact contexts."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core

    async def prepare(self, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> Prepared:
        """The context of a job and its first token; fills `report`. Publishes the new prefix chunks in the background.

        Raises `Busy` when the pool has no room, `DeadlineExceeded`.
        """
        token_ids = job.context.token_ids
        chain = list(job.ids.prefix_chain(token_ids))
        prefix = await self._prefix(job, chain[: (len(token_ids) - 1) // PREFIX_CHUNK_TOKENS], report, deadline)
        num_cached = len(prefix) * PREFIX_CHUNK_TOKENS
        report.sources[TokenSource.COMPUTED] += max(0, job.prompt.num_tokens - num_cached)
        prepared = None
        if len(token_ids) - num_cached > self._parts.config.local_prefill_tokens:
            prepared = await self._hand_off(job, token_ids, prefix, report, deadline)
        if prepared is None:
            prepared = await self._prefill_here(job, token_ids, prefix)
        fresh = self._core.register_prefix(prepared.context, chain)
        if self._parts.config.publish:
            self._parts.publisher.publish(job.tenant_id, ChunkKind.PREFIX, fresh)
        return prepared

    async def _prefix(
        self, job: GenerateJob, chain: Sequence[bytes], report: ReuseReport, deadline: Deadline
    ) -> list[Run]:
        """Runs of the longest prefix that is here or stored, each with a reference."""
        resident = self._core.acquire_prefix(chain)
        rest = chain[len(resident) :]
        if not rest:
            _count(report, job, [TokenSource.DEVICE] * len(resident))
            return resident
        try:
            fetched = await self._parts.fetcher.fetch_prefix(
                job.tenant_id,
                rest,
                len(resident) * PREFIX_CHUNK_TOKENS,
                deadline.share(self._parts.config.store_share),
            )
        except BaseException:
            release_runs(self._core.pool, resident)
            raise
        _report(report, job, len(resident), rest, fetched)
        return [*resident, *fetched.runs.values()]

    async def _hand_off(
        self, job: GenerateJob, token_ids: Sequence[int], prefix: Sequence[Run], report: ReuseReport, deadline: Deadline
    ) -> Prepared | None:
        """Has a prefill node compute what is behind `prefix`. None when none can; takes the references otherwise."""
        core, config = self._core, self._parts.config
        num_cached = len(prefix) * PREFIX_CHUNK_TOKENS
        num_live = len(token_ids) - num_cached
        live = core.pool.allocate(num_live, in_transfer=True)
        try:
            done = await self._parts.prefill_nodes.first_that_can(
                job.prefill_hints,
                config.prefill_share,
                deadline,
                lambda address, share: self._prefill_at(address, job, token_ids, num_cached, live, share),
            )
        except BaseException:
            core.pool.release(live)
            release_runs(core.pool, prefix)
            raise
        if done is None:
            core.pool.release(live)
            return None
        name, handed_off = done
        core.pool.arrive(live)
        report.live_bytes += handed_off.num_bytes
        report.nodes.append(name)
        context = core.arrived_context(prefix, Run(live, 0, num_live, num_cached))
        return Prepared(context, handed_off.first_token)

    async def _prefill_at(
        self,
        address: str,
        job: GenerateJob,
        token_ids: Sequence[int],
        num_cached: int,
        live: Extent,
        deadline: Deadline,
    ) -> HandedOff:
        num_live = len(token_ids) - num_cached
        work = ContextWork(
            token_ids=token_ids,
            num_cached_tokens=num_cached,
            sampling=sampling_to_pb(job.sampling),
            token_index=len(job.received_ids),
        )
        return await self._parts.prefill.prefill(
            address,
            start_message(self._parts, job),
            work,
            self._core.adapter.kv_shape,
            lambda layer, key, value: write_layer(live, 0, layer, num_live, key, value),
            deadline,
        )

    async def _prefill_here(self, job: GenerateJob, token_ids: Sequence[int], prefix: Sequence[Run]) -> Prepared:
        core = self._core

        def prefill() -> Prepared:
            context = core.exact_context(token_ids, prefix)
            try:
                return Prepared(context, core.first_token(context, job.sampling, len(job.received_ids)))
            except BaseException:
                context.close()
                raise

        return await self._parts.thread.run(
            prefill,
            discard=lambda prepared: prepared.context.close(),
            skip=lambda: release_runs(core.pool, prefix),
        )


def start_message(parts: NodeParts, job: GenerateJob) -> PrefillStart:
    """The first message of a stream to a prefill node, its work not yet named."""
    return PrefillStart(
        request_id=job.request_id,
        tenant_id=job.tenant_id,
        fingerprint=parts.core.adapter.fingerprint,
        accepted_codecs=ACCEPTED_CODECS,
    )


def _count(report: ReuseReport, job: GenerateJob, sources: Sequence[TokenSource]) -> None:
    """Counts prefix chunks by source, as far as the prompt reaches: a replay's received tokens are not prompt."""
    for index, source in enumerate(sources):
        left = job.prompt.num_tokens - index * PREFIX_CHUNK_TOKENS
        report.sources[source] += max(0, min(PREFIX_CHUNK_TOKENS, left))


def _report(report: ReuseReport, job: GenerateJob, num_resident: int, rest: Sequence[bytes], fetched: Fetched) -> None:
    sources = [TokenSource.DEVICE] * num_resident
    sources += [fetched.sources[chunk_id] for chunk_id in fetched.runs]
    _count(report, job, sources)
    report.chunk_bytes += fetched.num_bytes
    report.misses += [
        Miss(chunk_id, ChunkKind.PREFIX, fetched.misses[chunk_id], PREFIX_CHUNK_TOKENS)
        for chunk_id in rest
        if chunk_id in fetched.misses
    ]
