"""LINKED: what a prompt is composed of is found here, in stores and on prefill nodes; then one link pass over it.

The pass begins when every chunk is here or on its way, and reads each layer as it comes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from spolia_core.prompt import Prompt
from spolia_core.reuse import ChunkKind, Miss, MissReason, ReuseReport, TokenSource
from spolia_decode.composition import (
    Composition,
    LinkTermsOfPrompt,
    num_blocks_before_documents,
    usable_prefix,
)
from spolia_decode.continuation import LinkedContinuation
from spolia_decode.gather import ChunkGatherer, chunk_id_of
from spolia_decode.gathered import Gathered
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_decode.prepared import Prepared
from spolia_decode.sealing import publish_resident
from spolia_engine.context import release_runs
from spolia_engine.link_plan import LinkPlan
from spolia_engine.passes import PassOptions
from spolia_engine.run import Run
from spolia_engine.sealing import SealedBlock, prefix_blocks
from spolia_node.deadline import Deadline
from spolia_worker.arriving import ChunkLost

WORTH_ASKING_S = 0.005
"""Rows that take less are computed without asking whether a store has them: the question alone takes a millisecond or
two."""


@dataclass(slots=True)
class _Held:
    """Runs that come before everything computed, each with a reference the request owns, and where they came from."""

    runs: list[Run] = field(default_factory=list)
    sources: list[TokenSource] = field(default_factory=list)

    def extend(self, runs: Sequence[Run], sources: Sequence[TokenSource]) -> None:
        """Takes the references of runs."""
        self.runs += runs
        self.sources += sources

    @property
    def num_tokens(self) -> int:
        """Tokens they hold."""
        return sum(run.num_tokens for run in self.runs)


class LinkedPath:
    """Builds linked contexts."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core
        self._gatherer = ChunkGatherer(parts)
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

    async def prepare(self, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> Prepared:
        """The context of a job and its first token; fills `report`. Raises `Busy` or `DeadlineExceeded`."""
        chain = list(job.ids.prefix_chain(job.context.token_ids))
        async with self._holding() as held:
            await self._hold_prefix(held, job, chain, report, deadline)
            composition = Composition.of(job.prompt, job.context, self._terms, job.ids, chain, held.num_tokens)
            num_prefix_runs = len(held.runs)
            await self._hold_linked(held, composition, job, report, deadline)
            num_held = len(held.runs) - num_prefix_runs
            plan = composition.plan(num_held)
            async with self._gathering(job, plan) as gathered:
                prepared = await self._link(job, composition.context, plan, held, gathered, report, deadline)
                _fill(report, job, composition, plan, held, gathered)
        self._keep(job, composition, plan, prepared, num_held)
        continuation = LinkedContinuation(
            job.prompt, job.context.num_tokens, job.ids, composition.whole, composition.linked, self._terms
        )
        return replace(prepared, continuation=continuation)

    # What stands before everything computed

    async def _hold_prefix(
        self, held: _Held, job: GenerateJob, chain: Sequence[bytes], report: ReuseReport, deadline: Deadline
    ) -> None:
        """The longest exact prefix: from memory, and from the store as far as something else has to be fetched too.

        Where all documents are here, prefix chunks over them are not asked for: they would replace what costs nothing.
        """
        usable = usable_prefix(chain, job.prompt.num_tokens)
        runs = self._core.acquire_prefix(usable)
        held.extend(runs, [TokenSource.DEVICE] * len(runs))
        plan = self._terms.plan(job.prompt, job.prompt)
        if all(chunk_id in self._core.resident for chunk_id in _reused_chunks(job.prompt, plan)):
            usable = usable[: num_blocks_before_documents(plan)]
        await self._fetch_held(held, prefix_blocks(usable, len(runs)), job, report, deadline)

    async def _hold_linked(
        self, held: _Held, composition: Composition, job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> None:
        """The rows between documents, as far as the context up to there repeats."""
        usable = composition.usable
        runs = self._core.acquire_prefix([block.chunk_id for block in usable])
        held.extend(runs, [TokenSource.DEVICE] * len(runs))
        rest = usable[len(runs) :]
        num_rows = sum(block.num_tokens for block in rest)
        compute_s = self._parts.costs.compute_s(num_rows, job.context.num_tokens)
        if compute_s is None or compute_s > WORTH_ASKING_S:
            await self._fetch_held(held, rest, job, report, deadline)

    async def _fetch_held(
        self,
        held: _Held,
        blocks: Sequence[SealedBlock],
        job: GenerateJob,
        report: ReuseReport,
        deadline: Deadline,
    ) -> None:
        """Takes the beginning of a chain from the store, where it is there."""
        if not blocks:
            return
        share = deadline.share(self._parts.config.store_share)
        fetched = await self._parts.fetcher.fetch_prefix(job.tenant_id, blocks, share)
        report.chunk_bytes += fetched.num_bytes
        held.extend(list(fetched.runs.values()), [fetched.sources[chunk_id] for chunk_id in fetched.runs])
        # That a chain was not stored is no miss: nobody promised to keep it. That it could not be had is.
        report.misses += [
            Miss(block.chunk_id, block.kind, reason, block.num_tokens)
            for block in blocks
            if (reason := fetched.misses.get(block.chunk_id)) not in (None, MissReason.NOT_FOUND)
        ]

    @asynccontextmanager
    async def _holding(self) -> AsyncIterator[_Held]:
        """Runs whose references go back unless a pass took them."""
        held = _Held()
        try:
            yield held
        finally:
            release_runs(self._core.pool, held.runs)

    # Documents, and the pass over them

    @asynccontextmanager
    async def _gathering(self, job: GenerateJob, plan: LinkPlan) -> AsyncIterator[Gathered]:
        parts = job.context.parts
        wanted = {chunk_id_of(parts[f.part_index]): parts[f.part_index] for f in plan.fragments}
        gathered = Gathered(self._core.pool, wanted)
        try:
            yield gathered
        finally:
            await gathered.close()
            gathered.release()

    async def _link(
        self,
        job: GenerateJob,
        prompt: Prompt,
        plan: LinkPlan,
        held: _Held,
        gathered: Gathered,
        report: ReuseReport,
        deadline: Deadline,
    ) -> Prepared:
        """The link pass, begun anew where a chunk that it read was lost on its way."""
        while True:
            await self._gatherer.gather(gathered, job, report, deadline)
            try:
                prepared = await self._run_pass(job, prompt, plan, held, gathered, deadline)
            except ChunkLost:
                await gathered.settle()
                gathered.drop_lost()
                continue
            await gathered.settle()
            return prepared

    async def _run_pass(
        self, job: GenerateJob, prompt: Prompt, plan: LinkPlan, held: _Held, gathered: Gathered, deadline: Deadline
    ) -> Prepared:
        """One try. The pass has references of its own, so that another try finds everything here."""
        runs = _run_of_part(prompt, plan, gathered)
        taken = [*runs.values(), *held.runs]
        for run in taken:
            self._core.pool.retain(run.extent)
        options = PassOptions(slice_tokens=self._parts.config.slice_tokens, ready=gathered.ready())
        steps = self._core.linked_context_steps(prompt, runs, plan, held.runs, options)
        return await self._parts.compute(job, steps, taken, len(plan.positions), deadline)

    # What is kept

    def _keep(
        self, job: GenerateJob, composition: Composition, plan: LinkPlan, prepared: Prepared, num_held: int
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


def _run_of_part(prompt: Prompt, plan: LinkPlan, gathered: Gathered) -> dict[int, Run]:
    """Part index to run."""
    indices = dict.fromkeys(f.part_index for f in plan.fragments)
    return {index: gathered.runs[chunk_id_of(prompt.parts[index])] for index in indices}


def _reused_chunks(prompt: Prompt, plan: LinkPlan) -> dict[bytes, int]:
    """Length in tokens by id of every chunk that has a fragment."""
    parts = [prompt.parts[f.part_index] for f in plan.fragments]
    return {chunk_id_of(part): len(part.token_ids) for part in parts}


def _fill(
    report: ReuseReport,
    job: GenerateJob,
    composition: Composition,
    plan: LinkPlan,
    held: _Held,
    gathered: Gathered,
) -> None:
    """Counts prompt tokens by source; a replay's received tokens are recomputed, but are not prompt."""
    report.sources.update(composition.computed_sources(plan, job.prompt.num_tokens))
    for run, source in zip(held.runs, held.sources, strict=True):
        report.sources[source] += max(0, min(run.num_tokens, job.prompt.num_tokens - run.rope_base))
    for fragment in plan.fragments:
        source = gathered.sources[chunk_id_of(composition.context.parts[fragment.part_index])]
        report.sources[source] += fragment.end - fragment.start
    report.misses += [
        Miss(chunk_id, ChunkKind.LOCAL, gathered.misses[chunk_id], len(part.token_ids))
        for chunk_id, part in gathered.wanted.items()
        if chunk_id in gathered.misses
    ]
