"""Local chunks into this node's memory, each by the cheapest way that works: memory, store, prefill node, this node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spolia.v1.prefill_pb2 import ChunkToCompile
from spolia_core.chunk_object import parse_chunk_object
from spolia_core.errors import DataCorrupt, NotSupported
from spolia_core.prompt import Part
from spolia_core.reuse import ChunkKind, MissReason, ReuseReport, TokenSource
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_decode.prefill_client import CompiledChunk
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_worker.chunk_fetch import Fetched, adopt_local
from spolia_worker.claims import Claim, ClaimOutcome
from spolia_worker.timed import timed

STORE_AWAY = (MissReason.STORE_UNREACHABLE, MissReason.STORE_LATE)
log = get_log(__name__)


@dataclass(slots=True)
class Gathered:
    """Chunks that a prompt wants, and the runs of those that are here, each with one reference the request owns."""

    wanted: dict[bytes, Part]
    runs: dict[bytes, Run] = field(default_factory=dict)
    sources: dict[bytes, TokenSource] = field(default_factory=dict)
    misses: dict[bytes, MissReason] = field(default_factory=dict)

    @property
    def missing(self) -> list[bytes]:
        """Chunks not here yet, in the order of the prompt."""
        return [chunk_id for chunk_id in self.wanted if chunk_id not in self.runs]

    def add(self, chunk_id: bytes, run: Run, source: TokenSource) -> None:
        """Takes a run's reference."""
        self.runs[chunk_id] = run
        self.sources[chunk_id] = source


class ChunkGatherer:
    """Brings local chunks in, each once however many requests want it."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core

    async def gather(self, gathered: Gathered, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> None:
        """Returns with nothing missing. Adds bytes and nodes to `report`. Raises `Busy` or `DeadlineExceeded`."""
        self._take_resident(gathered)
        while gathered.missing:
            with self._parts.arrivals.bringing(gathered.missing) as ours:
                await self._bring([i for i in gathered.missing if i in ours], gathered, job, report, deadline)
            await deadline.wait(
                self._parts.arrivals.wait(gathered.missing), "waiting for a chunk another request brings"
            )
            self._take_resident(gathered)

    def _take_resident(self, gathered: Gathered) -> None:
        for chunk_id in gathered.missing:
            run = self._core.resident.acquire(chunk_id)
            if run is not None:
                gathered.add(chunk_id, run, TokenSource.DEVICE)

    async def _bring(
        self, ids: Sequence[bytes], gathered: Gathered, job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> None:
        fetched = await self._fetch(ids, gathered, job, report, deadline)
        gathered.misses.update(fetched.misses)
        ids = _without(ids, gathered)
        inline = any(fetched.misses.get(chunk_id) in STORE_AWAY for chunk_id in ids)
        compiled = await self._compile_elsewhere(ids, inline, gathered, job, report, deadline)
        if compiled and not inline:
            # A store that lost them again, or broke off, is not asked a third time.
            await self._compile_elsewhere(_without(ids, gathered), True, gathered, job, report, deadline)
        for chunk_id in _without(ids, gathered):
            await self._compile_here(chunk_id, gathered, job, report, deadline)

    async def _fetch(
        self,
        ids: Sequence[bytes],
        gathered: Gathered,
        job: GenerateJob,
        report: ReuseReport,
        deadline: Deadline,
        compiled: frozenset[bytes] = frozenset(),
    ) -> Fetched:
        """Takes from the store what it has. Of `compiled` chunks that is no reuse: they were made for this request."""
        if not ids:
            return Fetched()
        lengths = {chunk_id: len(gathered.wanted[chunk_id].token_ids) for chunk_id in ids}
        share = deadline.share(self._parts.config.store_share)
        fetched = await self._parts.fetcher.fetch_local(job.tenant_id, lengths, share)
        report.chunk_bytes += fetched.num_bytes
        for chunk_id, run in fetched.runs.items():
            source = TokenSource.COMPILED if chunk_id in compiled else fetched.sources[chunk_id]
            gathered.add(chunk_id, run, source)
        return fetched

    async def _compile_elsewhere(
        self,
        ids: Sequence[bytes],
        inline: bool,
        gathered: Gathered,
        job: GenerateJob,
        report: ReuseReport,
        deadline: Deadline,
    ) -> bool:
        """Has a prefill node compile chunks: through the store, or `inline` where the store cannot be had.

        False when no node did.
        """
        if not ids:
            return False
        chunks = [ChunkToCompile(chunk_id=i, token_ids=gathered.wanted[i].token_ids) for i in ids]
        done = await self._parts.prefill_nodes.first_that_can(
            job.prefill_hints,
            deadline,
            lambda address, share: self._parts.prefill.compile(
                address, self._parts.start_message(job), chunks, inline, share
            ),
        )
        if done is None:
            return False
        node_id, compiled = done
        if node_id not in report.nodes:
            report.nodes.append(node_id)
        self._adopt_inline(compiled, gathered, report)
        if not inline:
            made = frozenset(chunk.chunk_id for chunk in compiled if chunk.num_computed_tokens)
            await self._fetch(_without(ids, gathered), gathered, job, report, deadline, made)
        return True

    def _adopt_inline(self, compiled: Iterable[CompiledChunk], gathered: Gathered, report: ReuseReport) -> None:
        for chunk in compiled:
            part = gathered.wanted.get(chunk.chunk_id)
            if chunk.data is None or part is None or chunk.chunk_id in gathered.runs:
                continue
            report.inline_bytes += len(chunk.data)
            try:
                gathered.add(chunk.chunk_id, self._adopted(chunk.chunk_id, chunk.data, part), TokenSource.COMPILED)
            except (DataCorrupt, NotSupported) as error:
                log.warning("inline chunk dropped", chunk_id=chunk.chunk_id.hex(), error=str(error))

    def _adopted(self, chunk_id: bytes, data: bytes, part: Part) -> Run:
        parsed = parse_chunk_object(data)
        expected = (chunk_id, len(part.token_ids), ChunkKind.LOCAL, 0)
        if (parsed.meta.chunk_id, parsed.meta.num_tokens, parsed.meta.kind, parsed.meta.rope_base) != expected:
            raise DataCorrupt(f"inline chunk is {parsed.meta}, not {chunk_id.hex()}")
        return adopt_local(self._core, parsed)

    async def _compile_here(
        self, chunk_id: bytes, gathered: Gathered, job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> None:
        """No prefill node could: this one computes, unless another node does so already."""
        waiting = deadline.share(self._parts.config.store_share)
        claim = await self._parts.claims.take(job.tenant_id, chunk_id, job.request_id, waiting, deadline)
        try:
            if claim.outcome is ClaimOutcome.STORED:
                await self._fetch([chunk_id], gathered, job, report, deadline)
            if claim.outcome is ClaimOutcome.HELD:
                gathered.misses[chunk_id] = MissReason.CLAIM_TIMEOUT
            if chunk_id not in gathered.runs:
                compute_s = await self._compile(chunk_id, gathered, deadline)
                self._publish(chunk_id, compute_s, gathered, job, claim)
        except BaseException:
            claim.give_back()
            raise

    async def _compile(self, chunk_id: bytes, gathered: Gathered, deadline: Deadline) -> float:
        """Adds the chunk, and says how many seconds the engine took."""
        core, token_ids = self._core, gathered.wanted[chunk_id].token_ids
        compiling = self._parts.thread.run(
            lambda: timed(lambda: core.compile(chunk_id, token_ids)),
            discard=lambda compiled: core.pool.release(compiled.result.extent),
        )
        compiled = await deadline.wait(compiling, "compiling a chunk")
        gathered.add(chunk_id, compiled.result, TokenSource.COMPILED)
        return compiled.seconds

    def _publish(self, chunk_id: bytes, compute_s: float, gathered: Gathered, job: GenerateJob, claim: Claim) -> None:
        """Stores a chunk in the background; its claim stands until that is done."""
        run = gathered.runs[chunk_id]
        self._parts.publisher.publish(
            job.tenant_id, ChunkKind.LOCAL, [(chunk_id, run)], claim, seconds_per_token=compute_s / run.num_tokens
        )


def chunk_id_of(part: Part) -> bytes:
    """The id of a part that is a chunk."""
    assert part.chunk_id is not None, "fragments are of chunks"
    return part.chunk_id


def _without(ids: Sequence[bytes], gathered: Gathered) -> list[bytes]:
    """Those of `ids` that are not here yet."""
    return [chunk_id for chunk_id in ids if chunk_id not in gathered.runs]
