"""LINKED: local chunks from memory, the store or a prefill node; then one link pass, here, over all of them."""

from __future__ import annotations

from spolia_core.prompt import Prompt
from spolia_core.reuse import ChunkKind, Miss, ReuseReport, TokenSource
from spolia_decode.gather import ChunkGatherer, Gathered, chunk_id_of
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_decode.prepared import Prepared
from spolia_engine.context import release_runs
from spolia_engine.engine import linked_sources
from spolia_engine.link_plan import LinkPlan, plan_link, plan_recompute
from spolia_engine.run import Run
from spolia_node.deadline import Deadline


class LinkedPath:
    """Builds linked contexts."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core
        self._gatherer = ChunkGatherer(parts)

    def min_blocks(self, job: GenerateJob) -> int:
        """Blocks that the context takes at least: one run per reused chunk, and one of what is recomputed."""
        pool, plan = self._core.pool, self._plan(job)
        reused = _reused_chunks(job.context, plan).values()
        return sum(map(pool.blocks_for, reused)) + pool.blocks_for(len(plan.positions))

    def blocks_to_take(self, job: GenerateJob) -> int:
        """Blocks that the context would take now, beside the chunks that are here."""
        pool, plan = self._core.pool, self._plan(job)
        lengths = _reused_chunks(job.context, plan)
        missing = [length for chunk_id, length in lengths.items() if chunk_id not in self._core.resident]
        return sum(map(pool.blocks_for, missing)) + pool.blocks_for(len(plan.positions))

    async def prepare(self, job: GenerateJob, report: ReuseReport, deadline: Deadline) -> Prepared:
        """The context of a job and its first token; fills `report`. Raises `Busy` or `DeadlineExceeded`."""
        prompt, plan = job.context, self._plan(job)
        gathered = Gathered(
            {chunk_id_of(prompt.parts[f.part_index]): prompt.parts[f.part_index] for f in plan.fragments}
        )
        try:
            await self._gatherer.gather(gathered, job, report, deadline)
        except BaseException:
            release_runs(self._core.pool, list(gathered.runs.values()))
            raise
        _fill(report, job, prompt, plan, gathered)
        runs = self._run_of_part(prompt, plan, gathered)
        return await self._parts.compute(
            job, lambda: self._core.linked_context(prompt, runs, plan), list(runs.values()), deadline
        )

    def _plan(self, job: GenerateJob) -> LinkPlan:
        policy = self._parts.terms.policy
        plan = plan_link(
            job.prompt,
            policy.num_link_tokens,
            self._parts.config.min_reused_tokens,
            num_sink_tokens=policy.num_sink_tokens,
        )
        # A replay recomputes what the first node did, and the received tokens: planned anew, a document that ends the
        # prompt would no longer have its last token recomputed, and the answer could go on differently.
        return plan_recompute(job.context, plan.positions) if job.received_ids else plan

    def _run_of_part(self, prompt: Prompt, plan: LinkPlan, gathered: Gathered) -> dict[int, Run]:
        """Part index to run, with one reference for each: the same document twice takes two."""
        runs: dict[int, Run] = {}
        for index in dict.fromkeys(f.part_index for f in plan.fragments):
            run = gathered.runs[chunk_id_of(prompt.parts[index])]
            if run in runs.values():
                self._core.pool.retain(run.extent)
            runs[index] = run
        return runs


def _reused_chunks(prompt: Prompt, plan: LinkPlan) -> dict[bytes, int]:
    """Length in tokens by id of every chunk that has a fragment."""
    parts = [prompt.parts[f.part_index] for f in plan.fragments]
    return {chunk_id_of(part): len(part.token_ids) for part in parts}


def _fill(report: ReuseReport, job: GenerateJob, prompt: Prompt, plan: LinkPlan, gathered: Gathered) -> None:
    """Counts prompt tokens by source; a replay's received tokens are recomputed, but are not prompt."""
    report.sources.update(linked_sources(prompt, plan))
    report.sources[TokenSource.COMPUTED] -= len(job.received_ids)
    for fragment in plan.fragments:
        source = gathered.sources[chunk_id_of(prompt.parts[fragment.part_index])]
        report.sources[source] += fragment.end - fragment.start
    report.misses += [
        Miss(chunk_id, ChunkKind.LOCAL, gathered.misses[chunk_id], len(part.token_ids))
        for chunk_id, part in gathered.wanted.items()
        if chunk_id in gathered.misses
    ]
