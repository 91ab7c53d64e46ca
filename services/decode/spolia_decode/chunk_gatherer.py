"""Local chunks into this node's memory, each by the cheapest way that works: memory, store, prefill node, this node.

    missing ──▶ one lookup ──▶ stored: arrives layer by layer ───────────────┐
                   │ not stored, or slower to fetch than to compute          ├──▶ the link pass begins
                   ├──▶ prefill nodes, all at once: each arrives when ready ─┤
                   └──▶ this node ───────────────────────────────────────────┘

Gathering ends when every chunk is here or on its way. One that is lost on its way is missing again, and is brought by
the next `Way`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from spolia.v1.kvstore_pb2 import LookupEntry
from spolia.v1.prefill_pb2 import CHUNK_OUTCOME_INLINE, ChunkToCompile
from spolia_core.chunk_object import parse_chunk_object
from spolia_core.errors import Busy, DataCorrupt, NotSupported, SpoliaError
from spolia_core.prompt import Part
from spolia_core.reuse import ChunkKind, MissReason, ReuseReport, TokenSource
from spolia_decode.fetch_batch import FetchBatch
from spolia_decode.job import GenerateJob
from spolia_decode.link_metrics import Gate
from spolia_decode.local_chunks import LocalChunks, Way
from spolia_decode.node_parts import NodeParts
from spolia_decode.prefill_client import CompiledChunk
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_node.together import run_together
from spolia_node.tracing import current_span, span
from spolia_worker.arriving import ArrivingChunk
from spolia_worker.chunk_fetch import ACCEPTED_CODECS, adopt_local, miss_of, reason_of, source_of
from spolia_worker.claims import Claim, ClaimOutcome
from spolia_worker.engine_job import EngineJob, WorkKind
from spolia_worker.timed import timed_steps

log = get_log(__name__)


class ChunkGatherer:
    """Brings local chunks in, each once however many requests want it."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core

    async def gather(self, chunks: LocalChunks, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> None:
        """Returns with nothing missing: every chunk is here or arriving. Adds bytes and nodes to `report`.

        Raises `Busy` or `DeadlineExceeded`. The caller closes and releases `chunks`, also then.
        """
        self._take_resident(chunks)
        if not chunks.missing:
            return
        with span("fetch", num_chunks=len(chunks.missing)):
            while chunks.missing:
                bringing = _Bringing(self._parts, chunks, job, report, deadline)
                await bringing.run(self._parts.arrivals.begin(chunks.missing))
                await deadline.wait(
                    self._parts.arrivals.wait(chunks.missing), "waiting for a chunk another request brings"
                )
                self._take_resident(chunks)

    def _take_resident(self, chunks: LocalChunks) -> None:
        for chunk_id in chunks.missing:
            run = self._core.resident.acquire(chunk_id)
            if run is not None:
                current_span().event("cache.hit", chunk_id=chunk_id.hex(), source="device", num_tokens=run.num_tokens)
                chunks.add(chunk_id, run, TokenSource.DEVICE)


class _Bringing:
    """One request's part in bringing chunks: those that nobody else brings."""

    def __init__(
        self, parts: NodeParts, chunks: LocalChunks, job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> None:
        self._parts = parts
        self._core = parts.core
        self._chunks = chunks
        self._job = job
        self._report = report
        self._deadline = deadline
        self._ours: set[bytes] = set()
        self._batches: dict[tuple[TokenSource, bool], FetchBatch] = {}
        self._not_worth_fetching: set[bytes] = set()
        self._busy: Busy | None = None

    async def run(self, ours: set[bytes]) -> None:
        """Brings `ours`, or sees them begin to arrive. Those that do not arrive are given up, for others to look."""
        self._ours = ours
        try:
            await self._bring([chunk_id for chunk_id in self._chunks.wanted if chunk_id in ours])
        finally:
            for chunk_id in ours:
                if chunk_id not in self._chunks.arriving:
                    self._parts.arrivals.end(chunk_id)

    async def _bring(self, ids: Sequence[bytes]) -> None:
        await self._fetch_stored([i for i in ids if self._chunks.way(i) is Way.FETCH])
        for way in (Way.THROUGH_STORE, Way.INLINE):
            await self._compile_elsewhere([i for i in self._left(ids) if self._chunks.way(i) is way], way)
        for chunk_id in self._left(ids):
            await self._compile_here(chunk_id)

    def _left(self, ids: Iterable[bytes]) -> list[bytes]:
        return [chunk_id for chunk_id in ids if chunk_id not in self._chunks.runs]

    # From the store

    async def _fetch_stored(self, ids: Sequence[bytes]) -> None:
        """Starts the arrival of what is stored and worth it; says of the rest why not."""
        if not ids:
            return
        for chunk_id, entry in zip(ids, await self._lookup(ids), strict=False):
            if not entry.HasField("info"):
                self._miss(chunk_id, miss_of(entry), Way.THROUGH_STORE)
            elif self._is_slower(chunk_id, entry):
                self._not_worth_fetching.add(chunk_id)
                self._miss(chunk_id, MissReason.SLOWER_THAN_COMPUTING, Way.HERE)
            else:
                self._arrive(chunk_id, source_of(entry.tier))

    async def _lookup(self, ids: Sequence[bytes]) -> Sequence[LookupEntry]:
        """What stores say of the chunks; nothing where none could be asked, with the reason noted."""
        share = self._deadline.share(self._parts.config.store_share)
        try:
            return await self._parts.store.lookup(
                self._job.tenant_id, ids, self._core.adapter.fingerprint, ACCEPTED_CODECS, share
            )
        except SpoliaError as error:
            for chunk_id in ids:
                self._miss(chunk_id, reason_of(error), Way.INLINE)
            return []

    def _is_slower(self, chunk_id: bytes, entry: LookupEntry) -> bool:
        """The cost gate: whether computing the chunk here is expected to be faster than fetching it."""
        if not self._parts.config.cost_gate:
            return False
        num_tokens = len(self._chunks.wanted[chunk_id].token_ids)
        tier = source_of(entry.tier)
        decision = Gate.of(self._parts.costs.compare(tier, entry.info.size_bytes, num_tokens))
        self._parts.link_metrics.gated(tier, decision)
        return decision is Gate.COMPUTE

    def _miss(self, chunk_id: bytes, reason: MissReason, way: Way) -> None:
        current_span().event("cache.miss", chunk_id=chunk_id.hex(), reason=reason.name.lower())
        self._chunks.misses[chunk_id] = reason
        self._chunks.next_way(chunk_id, way)

    def _arrive(self, chunk_id: bytes, source: TokenSource, tier: TokenSource | None = None) -> None:
        """Begins to fetch a chunk; `tier` where a report calls its source otherwise. Raises `Busy` without room."""
        chunk = ArrivingChunk(self._core, chunk_id, len(self._chunks.wanted[chunk_id].token_ids))
        # What was compiled for this request comes while others are computed: that says little of the way itself.
        is_measured = self._chunks.way(chunk_id) is Way.FETCH
        batch = self._batches.setdefault((tier or source, is_measured), FetchBatch(is_measured=is_measured))
        batch.begin()
        task = asyncio.get_running_loop().create_task(self._receive(chunk, batch), name="fetch")
        # Not in the task's own `finally`, which a task that is cancelled before it began never reaches.
        task.add_done_callback(lambda _: self._received(chunk, tier or source, batch))
        self._chunks.add_arriving(chunk, source, task)

    async def _receive(self, chunk: ArrivingChunk, batch: FetchBatch) -> None:
        """Takes one chunk from the store. Whatever goes wrong makes it a miss."""
        share = self._deadline.share(self._parts.config.store_share)
        with span("get", chunk_id=chunk.chunk_id.hex(), num_tokens=chunk.run.num_tokens) as getting:
            fetched = await self._parts.fetcher.fetch_arriving(
                self._job.tenant_id, chunk, share, self._parts.thread.look_again
            )
            getting.set(num_bytes=fetched.num_bytes, is_miss=fetched.miss is not None)
        self._report.chunk_bytes += fetched.num_bytes
        batch.num_bytes += fetched.num_bytes
        if fetched.miss is not None:
            way = Way.THROUGH_STORE if self._chunks.way(chunk.chunk_id) is Way.FETCH else Way.INLINE
            self._miss(chunk.chunk_id, fetched.miss, way)

    def _received(self, chunk: ArrivingChunk, tier: TokenSource, batch: FetchBatch) -> None:
        """The fetch has ended, one way or another."""
        if not chunk.is_complete:
            batch.spoil()
            chunk.fail(DataCorrupt("its fetch ended early"))
        chunk.release()
        self._parts.arrivals.end(chunk.chunk_id)
        self._parts.thread.look_again()
        seconds = batch.end()
        if seconds is not None:
            expected_s = self._parts.costs.fetch_s(tier, batch.num_bytes)
            self._parts.link_metrics.fetched(tier, expected_s, seconds)
            self._parts.costs.fetched(tier, batch.num_bytes, seconds)

    # From prefill nodes

    async def _compile_elsewhere(self, ids: Sequence[bytes], way: Way) -> None:
        """Has prefill nodes compile chunks, as many nodes as there are at once."""
        if not ids:
            return
        sizes = self._chunks.lengths(ids)
        shares = self._parts.prefill_nodes.spread(sizes, self._job.prefill_hints)
        if not shares:
            self._give_up(ids)
            return
        await run_together(self._compile_share(share, number, way) for number, share in enumerate(shares) if share)

    async def _compile_share(self, ids: Sequence[bytes], number: int, way: Way) -> None:
        """One node's part; where it fails, the next node's. Those that no node made are for the next way."""
        with span("compile request", num_chunks=len(ids), way=way.name.lower()) as asking:
            done = await self._parts.prefill_nodes.first_that_can(
                self._job.prefill_hints,
                self._deadline,
                lambda address, until: self._compile_at(address, self._left(ids), way, until),
                skip=number,
            )
            asking.set(node="" if done is None else done[0])
        if self._busy is not None:
            raise self._busy
        if done is None:
            self._give_up(self._left(ids))
            return
        node_id, _ = done
        if node_id not in self._report.nodes:
            self._report.nodes.append(node_id)
        for chunk_id in self._left(ids):
            self._chunks.next_way(chunk_id, Way(way + 1))

    def _give_up(self, ids: Iterable[bytes]) -> None:
        for chunk_id in ids:
            self._chunks.next_way(chunk_id, Way.HERE)

    async def _compile_at(self, address: str, ids: Sequence[bytes], way: Way, deadline: Deadline) -> None:
        to_compile = [ChunkToCompile(chunk_id=i, token_ids=self._chunks.wanted[i].token_ids) for i in ids]
        if to_compile:
            start = self._parts.start_message(self._job)
            await self._parts.prefill.compile(address, start, to_compile, way is Way.INLINE, deadline, self._compiled)

    def _compiled(self, chunk: CompiledChunk) -> None:
        """A chunk is ready: in the store, or in the stream. That there is no room for it is not its node's failure."""
        try:
            self._take_compiled(chunk)
        except Busy as error:
            self._busy = error

    def _take_compiled(self, chunk: CompiledChunk) -> None:
        part = self._chunks.wanted.get(chunk.chunk_id)
        if part is None or chunk.chunk_id in self._chunks.runs or chunk.chunk_id not in self._ours:
            return
        if chunk.outcome == CHUNK_OUTCOME_INLINE:
            self._adopt_inline(chunk, part)
            return
        self._chunks.next_way(chunk.chunk_id, Way.THROUGH_STORE)
        # Found there, it was made for another request.
        source = TokenSource.COMPILED if chunk.num_computed_tokens else TokenSource.HOST
        self._arrive(chunk.chunk_id, source, tier=TokenSource.HOST)

    def _adopt_inline(self, chunk: CompiledChunk, part: Part) -> None:
        assert chunk.data is not None, "an inline chunk comes with its bytes"
        self._report.inline_bytes += len(chunk.data)
        try:
            run = self._adopted(chunk.chunk_id, chunk.data, part)
        except (DataCorrupt, NotSupported) as error:
            log.warning("inline chunk dropped", chunk_id=chunk.chunk_id.hex(), error=str(error))
            return
        self._chunks.add(chunk.chunk_id, run, TokenSource.COMPILED)

    def _adopted(self, chunk_id: bytes, data: bytes, part: Part) -> Run:
        parsed = parse_chunk_object(data)
        expected = (chunk_id, len(part.token_ids), ChunkKind.LOCAL, 0)
        if (parsed.meta.chunk_id, parsed.meta.num_tokens, parsed.meta.kind, parsed.meta.rope_base) != expected:
            raise DataCorrupt(f"inline chunk is {parsed.meta}, not {chunk_id.hex()}")
        return adopt_local(self._core, parsed)

    # On this node

    async def _compile_here(self, chunk_id: bytes) -> None:
        """No other node is to, or could: this one computes, unless another node does so already."""
        if chunk_id in self._not_worth_fetching:
            await self._compile(chunk_id)  # it is stored: nothing to claim, nothing to store
            return
        waiting = self._deadline.share(self._parts.config.store_share)
        claim = await self._parts.claims.take(
            self._job.tenant_id, chunk_id, self._job.request_id, waiting, self._deadline
        )
        try:
            if claim.outcome is ClaimOutcome.STORED and self._may_be_had(chunk_id):
                self._chunks.next_way(chunk_id, Way.ALONE)
                self._arrive(chunk_id, TokenSource.HOST)
            if claim.outcome is ClaimOutcome.HELD:
                self._chunks.misses[chunk_id] = MissReason.CLAIM_TIMEOUT
            if chunk_id not in self._chunks.runs:
                compute_s = await self._compile(chunk_id)
                self._publish(chunk_id, compute_s, claim)
        except BaseException:
            claim.give_back()
            raise

    def _may_be_had(self, chunk_id: bytes) -> bool:
        """Whether to ask for a chunk that was stored meanwhile: once, and not where a copy was lost before."""
        is_lost = self._chunks.misses.get(chunk_id) in _LOST
        return self._chunks.way(chunk_id) is Way.HERE and not is_lost

    async def _compile(self, chunk_id: bytes) -> float:
        """Adds the chunk, and says how many seconds the engine took."""
        core, token_ids = self._core, self._chunks.wanted[chunk_id].token_ids
        num_rows = core.recipe.num_sink_tokens + len(token_ids)
        compiling = self._parts.thread.run_steps(
            timed_steps(core.compile_steps(chunk_id, token_ids, self._parts.pass_options())),
            EngineJob(self._job.tenant_id, num_rows, WorkKind.COMPILE),
            discard=lambda compiled: core.pool.release(compiled.result.extent),
        )
        with span("compile", chunk_id=chunk_id.hex(), num_tokens=len(token_ids)):
            compiled = await self._deadline.wait(compiling, "compiling a chunk")
        self._parts.costs.computed(num_rows, num_rows, compiled.seconds)
        self._chunks.add(chunk_id, compiled.result, TokenSource.COMPILED)
        return compiled.seconds

    def _publish(self, chunk_id: bytes, compute_s: float, claim: Claim) -> None:
        """Stores a chunk in the background; its claim stands until that is done."""
        run = self._chunks.runs[chunk_id]
        self._parts.publisher.publish(
            self._job.tenant_id,
            ChunkKind.LOCAL,
            [(chunk_id, run)],
            claim,
            seconds_per_token=compute_s / run.num_tokens,
        )


_LOST = (MissReason.DIGEST, MissReason.UNREADABLE, MissReason.STORE_UNREACHABLE, MissReason.STORE_LATE)
"""Reasons for which a stored chunk could not be had: asking again would most likely end the same."""
