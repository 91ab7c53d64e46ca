"""LINKED: what a prompt is composed of is found here, in stores and on prefill nodes; then one link pass over it.

The pass begins when every chunk is here or on its way, and reads each layer as it comes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from spolia_core.prompt import Prompt
from spolia_core.reuse import ChunkKind, Miss, ReuseReport, SourceSpan
from spolia_decode.answer_sealing import publish_resident
from spolia_decode.composition import Composition, LinkTermsOfPrompt, num_blocks_before_documents, usable_prefix
from spolia_decode.continuation import Continuation, ExactContinuation, LinkedContinuation
from spolia_decode.held_runs import ChainFinder, HeldRuns
from spolia_decode.job import GenerateJob
from spolia_decode.link_pass import LinkPasses, ToLink
from spolia_decode.local_chunks import LocalChunks, chunk_id_of
from spolia_decode.node_parts import NodeParts
from spolia_decode.prepared_context import PreparedContext
from spolia_engine.link_plan import LinkPlan
from spolia_node.deadline import Deadline


class LinkedPath:
    """Builds linked contexts."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core
        self._chains = ChainFinder(parts)
        self._passes = LinkPasses(parts)
        self._terms = LinkTermsOfPrompt(parts.terms.policy, parts.config.min_reused_tokens, parts.terms.profile)

    def min_blocks(self, job: GenerateJob) -> int:
        """Blocks that the context takes at least: one run per reused chunk, and one of what is recomputed."""
        pool, plan = self._core.pool, self._terms.plan(job.prompt, job.context)
        reused = _reused_chunks(job.context, plan).values()
        return sum(map(pool.blocks_for, reused)) + pool.blocks_for(len(plan.positions))

    def blocks_to_take(self, job: GenerateJob) -> int:
        """Blocks that the context would take now at most, beside the chunks that are here."""
        pool, plan = self._core.pool, self._terms.plan(job.prompt, job.context)
        lengths = _reused_chunks(job.context, plan)
        missing = [length for chunk_id, length in lengths.items() if chunk_id not in self._core.resident]
        return sum(map(pool.blocks_for, missing)) + pool.blocks_for(len(plan.positions))

    async def prepare(self, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> PreparedContext:
        """The context of a job, behind which the batch draws; fills `report`. Raises `Busy` or `DeadlineExceeded`."""
        prepared: PreparedContext | None = None
        try:
            async with self._chains.holding() as held:
                composition, num_held = await self._compose(held, job, report, deadline)
                plan = composition.plan(num_held)
                async with self._local_chunks(job, plan) as chunks:
                    work = ToLink(job, composition.context, plan, held, report, deadline)
                    prepared = await self._passes.run(work, chunks)
                    _fill(report, job, composition, plan, held, chunks)
            self._keep(job, composition, plan, prepared, num_held)
        except BaseException:
            if prepared is not None:
                prepared.context.close()
            raise
        return replace(prepared, continuation=_continuation(job, composition))

    async def _compose(
        self, held: HeldRuns, job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> tuple[Composition, int]:
        """What the context is made of, and how many of its linked chunks are held."""
        chain = list(job.ids.prefix_chain(job.context.token_ids))
        bare = self._terms.plan(job.prompt, job.prompt)
        await self._chains.hold_prefix(
            held,
            usable_prefix(chain, job.prompt.num_tokens),
            num_blocks_before_documents(bare),
            _reused_chunks(job.prompt, bare),
            job,
            report,
            deadline,
        )
        composition = Composition.of(job.prompt, job.context, self._terms, job.ids, chain, held.num_tokens)
        num_prefix_runs = len(held.runs)
        await self._chains.hold_linked(held, composition.usable, job, report, deadline)
        return composition, len(held.runs) - num_prefix_runs

    @asynccontextmanager
    async def _local_chunks(self, job: GenerateJob, plan: LinkPlan) -> AsyncIterator[LocalChunks]:
        """The plan's documents, given back at the end; a context has references of its own."""
        parts = job.context.parts
        wanted = {chunk_id_of(parts[f.part_index]): parts[f.part_index] for f in plan.fragments}
        chunks = LocalChunks(self._core.pool, wanted)
        try:
            yield chunks
        finally:
            try:
                await chunks.close()
            finally:
                chunks.release()

    def _keep(
        self, job: GenerateJob, composition: Composition, plan: LinkPlan, prepared: PreparedContext, num_held: int
    ) -> None:
        """Registers what the pass computed. Stored are prefix chunks, and linked ones that were of use once."""
        fresh = self._core.register_linked(prepared.context, plan, [*composition.exact, *composition.linked])
        if not self._parts.config.publish:
            return
        prefix_ids = {block.chunk_id for block in composition.exact}
        self._parts.publisher.publish(
            job.tenant_id,
            ChunkKind.PREFIX,
            [(chunk_id, run) for chunk_id, run in fresh if chunk_id in prefix_ids],
            seconds_per_token=prepared.seconds_per_token,
        )
        # A prompt that came again may come again elsewhere.
        publish_resident(self._parts, job, ChunkKind.LINKED, composition.linked[:num_held])


def _continuation(job: GenerateJob, composition: Composition) -> Continuation:
    """A context without any document is exact, and goes on with prefix chunks."""
    if composition.linked_chain is not None:
        return LinkedContinuation(composition.linked_chain)
    return ExactContinuation.of(job.ids, composition.context.token_ids, composition.chain)


def _reused_chunks(prompt: Prompt, plan: LinkPlan) -> dict[bytes, int]:
    """Length in tokens by id of every chunk that has a fragment."""
    parts = [prompt.parts[f.part_index] for f in plan.fragments]
    return {chunk_id_of(part): len(part.token_ids) for part in parts}


def _fill(
    report: ReuseReport,
    job: GenerateJob,
    composition: Composition,
    plan: LinkPlan,
    held: HeldRuns,
    chunks: LocalChunks,
) -> None:
    """Says where prompt tokens came from; a replay's received tokens are recomputed, but are not prompt."""
    num_prompt_tokens = job.prompt.num_tokens
    spans = list(composition.computed_spans(plan, num_prompt_tokens))
    for run, source in zip(held.runs, held.sources, strict=True):
        spans.append(SourceSpan(run.rope_base, min(run.num_tokens, num_prompt_tokens - run.rope_base), source))
    for fragment in plan.fragments:
        source = chunks.sources[chunk_id_of(composition.context.parts[fragment.part_index])]
        spans.append(SourceSpan(fragment.offset + fragment.start, fragment.end - fragment.start, source))
    report.place(spans)
    report.misses += [
        Miss(chunk_id, ChunkKind.LOCAL, chunks.misses[chunk_id], len(part.token_ids))
        for chunk_id, part in chunks.wanted.items()
        if chunk_id in chunks.misses
    ]
