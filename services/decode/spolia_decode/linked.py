"""LINKED: local chunks from memory, the store or a prefill node; then one link pass, here, over all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from spolia.v1.kvstore_pb2 import ClaimState
from spolia.v1.prefill_pb2 import ChunkToCompile
from spolia_core.chunk_object import parse_chunk_object
from spolia_core.errors import DataCorrupt, NotSupported, SpoliaError
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ChunkKind, Miss, MissReason, ReuseReport, TokenSource
from spolia_decode.exact import start_message
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_decode.prefill_client import CompiledChunk
from spolia_decode.prepared import Prepared
from spolia_engine.context import release_runs
from spolia_engine.engine import linked_sources
from spolia_engine.link_plan import LinkPlan, plan_link
from spolia_engine.run import Run
from spolia_node.deadline import Deadline
from spolia_node.logs import get_log
from spolia_worker.chunk_fetch import Fetched, adopt_local

log = get_log(__name__)


@dataclass(slots=True)
class _Gathered:
    """Runs by chunk id, each with one reference, and where they came from."""

    wanted: dict[bytes, Part]
    runs: dict[bytes, Run] = field(default_factory=dict)
    sources: dict[bytes, TokenSource] = field(default_factory=dict)
    misses: dict[bytes, MissReason] = field(default_factory=dict)

    @property
    def missing(self) -> list[Part]:
        """Chunks not here yet."""
        return [part for chunk_id, part in self.wanted.items() if chunk_id not in self.runs]

    def add(self, chunk_id: bytes, run: Run, source: TokenSource) -> None:
        """Takes a run's reference."""
        self.runs[chunk_id] = run
        self.sources[chunk_id] = source


class LinkedPath:
    """Builds linked contexts."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core

    async def prepare(self, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> Prepared:
        """The context of a job and its first token; fills `report`. Raises `Busy` or `DeadlineExceeded`."""
        prompt = job.context
        plan = plan_link(prompt, self._parts.config.link_tokens)
        report.link_tokens_per_chunk = self._parts.config.link_tokens
        wanted = {_chunk_id(prompt.parts[f.part_index]): prompt.parts[f.part_index] for f in plan.fragments}
        gathered = _Gathered(wanted)
        try:
            await self._gather(gathered, job, report, deadline)
        except BaseException:
            release_runs(self._core.pool, list(gathered.runs.values()))
            raise
        _fill(report, job, prompt, plan, gathered)
        return await self._link(job, prompt, plan, gathered)

    async def _gather(self, gathered: _Gathered, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> None:
        """Every chunk, by the cheapest way that works: memory, store, prefill node, this node."""
        for part in gathered.missing:
            run = self._core.resident.acquire(_chunk_id(part))
            if run is not None:
                gathered.add(_chunk_id(part), run, TokenSource.DEVICE)
        if gathered.missing:
            await self._fetch(gathered, job, report, deadline, record_misses=True)
        if gathered.missing:
            await self._compile_elsewhere(gathered, job, report, deadline)
        if gathered.missing:
            await self._compile_here(gathered, job, deadline)

    async def _fetch(
        self, gathered: _Gathered, job: GenerateJob, report: ReuseReport, deadline: Deadline, *, record_misses: bool
    ) -> Fetched:
        """Takes from the store what it has. After a compile that is no longer reuse, so misses stand as they were."""
        lengths = {_chunk_id(part): len(part.token_ids) for part in gathered.missing}
        share = deadline.share(self._parts.config.store_share)
        fetched = await self._parts.fetcher.fetch_local(job.tenant_id, lengths, share)
        report.chunk_bytes += fetched.num_bytes
        for chunk_id, run in fetched.runs.items():
            gathered.add(chunk_id, run, fetched.sources[chunk_id] if record_misses else TokenSource.COMPILED)
        if record_misses:
            gathered.misses.update(fetched.misses)
        return fetched

    async def _compile_elsewhere(
        self, gathered: _Gathered, job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> None:
        """Has a prefill node compile what is missing: through the store, or inline where the store cannot be had."""
        unreachable = (MissReason.STORE_UNREACHABLE, MissReason.STORE_LATE)
        inline = any(gathered.misses.get(_chunk_id(part)) in unreachable for part in gathered.missing)
        for is_inline in (inline, True):
            chunks = [ChunkToCompile(chunk_id=_chunk_id(p), token_ids=p.token_ids) for p in gathered.missing]
            done = await self._parts.prefill_nodes.first_that_can(
                job.prefill_hints,
                self._parts.config.prefill_share,
                deadline,
                lambda address, share, chunks=chunks, is_inline=is_inline: self._parts.prefill.compile(  # type: ignore[misc]  # mypy cannot infer lambdas with defaults
                    address, start_message(self._parts, job), chunks, is_inline, share
                ),
            )
            if done is None:
                return
            name, compiled = done
            if name not in report.nodes:
                report.nodes.append(name)
            self._adopt_inline(gathered, compiled, report)
            if not gathered.missing:
                return
            await self._fetch(gathered, job, report, deadline, record_misses=False)
            if not gathered.missing or is_inline:
                return

    def _adopt_inline(self, gathered: _Gathered, compiled: Iterable[CompiledChunk], report: ReuseReport) -> None:
        for chunk in compiled:
            if chunk.data is None or chunk.chunk_id in gathered.runs or chunk.chunk_id not in gathered.wanted:
                continue
            report.inline_bytes += len(chunk.data)
            try:
                parsed = parse_chunk_object(chunk.data)
                expected = (chunk.chunk_id, len(gathered.wanted[chunk.chunk_id].token_ids), ChunkKind.LOCAL)
                if (parsed.meta.chunk_id, parsed.meta.num_tokens, parsed.meta.kind) != expected:
                    raise DataCorrupt(f"inline chunk is {parsed.meta}, not {chunk.chunk_id.hex()}")
                gathered.add(chunk.chunk_id, adopt_local(self._core, parsed), TokenSource.COMPILED)
            except (DataCorrupt, NotSupported) as error:
                log.warning("inline chunk dropped", chunk_id=chunk.chunk_id.hex(), error=str(error))

    async def _compile_here(self, gathered: _Gathered, job: GenerateJob, deadline: Deadline) -> None:
        """No prefill node could: compute on this one. Claims first, so that others wait rather than do the same."""
        owner = f"{self._parts.config.node_id}/{job.request_id}"
        granted = await self._claim(gathered, job, owner, deadline)
        fresh: list[tuple[bytes, Run]] = []
        for part in gathered.missing:
            chunk_id = _chunk_id(part)
            run = await self._parts.thread.run(
                lambda part=part, chunk_id=chunk_id: self._core.compile(chunk_id, part.token_ids),  # type: ignore[misc]  # as above
                discard=lambda run: self._core.pool.release(run.extent),
            )
            gathered.add(chunk_id, run, TokenSource.COMPILED)
            fresh.append((chunk_id, run))
        self._parts.publisher.publish(job.tenant_id, ChunkKind.LOCAL, fresh, owner if granted else "")

    async def _claim(self, gathered: _Gathered, job: GenerateJob, owner: str, deadline: Deadline) -> bool:
        """Whether every missing chunk was granted. Without a store there is nobody to keep from doing the same."""
        config = self._parts.config
        try:
            results = await self._parts.store.claim(
                job.tenant_id,
                [_chunk_id(part) for part in gathered.missing],
                owner,
                deadline.share(config.store_share),
                ttl_ms=round(config.claim_ttl_s * 1000),
            )
        except SpoliaError as error:
            log.info("compiling without a claim", error=str(error))
            return False
        return all(result.state == ClaimState.CLAIM_STATE_GRANTED for result in results)

    async def _link(self, job: GenerateJob, prompt: Prompt, plan: LinkPlan, gathered: _Gathered) -> Prepared:
        core = self._core
        runs: dict[int, Run] = {}
        for index in dict.fromkeys(f.part_index for f in plan.fragments):
            run = gathered.runs[_chunk_id(prompt.parts[index])]
            if run in runs.values():  # the same document twice: a reference for each use
                core.pool.retain(run.extent)
            runs[index] = run

        def link() -> Prepared:
            context = core.linked_context(prompt, runs, plan)
            try:
                return Prepared(context, core.first_token(context, job.sampling, len(job.received_ids)))
            except BaseException:
                context.close()
                raise

        return await self._parts.thread.run(
            link,
            discard=lambda prepared: prepared.context.close(),
            skip=lambda: release_runs(core.pool, list(runs.values())),
        )


def _chunk_id(part: Part) -> bytes:
    assert part.chunk_id is not None, "fragments are of chunks"
    return part.chunk_id


def _fill(report: ReuseReport, job: GenerateJob, prompt: Prompt, plan: LinkPlan, gathered: _Gathered) -> None:
    """Counts prompt tokens by source; a replay's received tokens are recomputed, but are not prompt."""
    report.sources.update(linked_sources(prompt, plan))
    report.sources[TokenSource.COMPUTED] -= len(job.received_ids)
    for fragment in plan.fragments:
        source = gathered.sources[_chunk_id(prompt.parts[fragment.part_index])]
        report.sources[source] += fragment.end - fragment.start
    report.misses += [
        Miss(chunk_id, ChunkKind.LOCAL, reason, len(gathered.wanted[chunk_id].token_ids))
        for chunk_id, reason in gathered.misses.items()
    ]
