"""What a LINKED context holds before anything is computed: its exact prefix, and linked chunks behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from spolia_core.reuse import Miss, MissReason, ReuseReport, TokenSource
from spolia_decode.job import GenerateJob
from spolia_decode.node_parts import NodeParts
from spolia_engine.context import release_runs
from spolia_engine.linked_blocks import LinkedBlock
from spolia_engine.run import Run
from spolia_engine.sealing import SealedBlock, prefix_blocks
from spolia_node.deadline import Deadline

WORTH_ASKING_S = 0.005
"""Rows that take less are computed without asking whether a store has them: the question alone takes a millisecond or
two."""


@dataclass(slots=True)
class HeldRuns:
    """Runs at their absolute positions, each with a reference the request owns, and where they came from."""

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


class ChainFinder:
    """Finds chains of chunks: in memory, then in the store."""

    def __init__(self, parts: NodeParts) -> None:
        self._parts = parts
        self._core = parts.core

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[HeldRuns]:
        """Runs that are given back at the end; a context has references of its own."""
        held = HeldRuns()
        try:
            yield held
        finally:
            release_runs(self._core.pool, held.runs)

    async def hold_prefix(
        self,
        held: HeldRuns,
        chain: Sequence[bytes],
        num_before_documents: int,
        documents: Collection[bytes],
        job: GenerateJob,
        report: ReuseReport,
        deadline: Deadline,
    ) -> None:
        """The longest exact prefix of `chain`: from memory, and as far as something has to be fetched, from the store.

        Where all `documents` are here, only the `num_before_documents` chunks before them are asked for: those over
        them would replace what costs nothing.
        """
        runs = self._core.acquire_prefix(chain)
        held.extend(runs, [TokenSource.DEVICE] * len(runs))
        if all(chunk_id in self._core.resident for chunk_id in documents):
            chain = chain[:num_before_documents]
        await self._fetch(held, prefix_blocks(chain, len(runs)), job, report, deadline)

    async def hold_linked(
        self, held: HeldRuns, blocks: Sequence[LinkedBlock], job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> None:
        """The rows between documents, as far as the context up to there repeats."""
        runs = self._core.acquire_prefix([block.chunk_id for block in blocks])
        held.extend(runs, [TokenSource.DEVICE] * len(runs))
        rest = blocks[len(runs) :]
        num_rows = sum(block.num_tokens for block in rest)
        compute_s = self._parts.costs.compute_s(num_rows, job.context.num_tokens)
        if compute_s is None or compute_s > WORTH_ASKING_S:
            await self._fetch(held, rest, job, report, deadline)

    async def _fetch(
        self, held: HeldRuns, blocks: Sequence[SealedBlock], job: GenerateJob, report: ReuseReport, deadline: Deadline
    ) -> None:
        """Takes the beginning of a chain from the store, where it is there."""
        if not blocks:
            return
        share = deadline.share(self._parts.config.store_share)
        fetched = await self._parts.fetcher.fetch_prefix(job.tenant_id, blocks, share)
        report.chunk_bytes += fetched.num_bytes
        held.extend(list(fetched.runs.values()), [fetched.sources[chunk_id] for chunk_id in fetched.runs])
        # That a chain was not stored is no miss: nobody promised to keep it. That it could not be had is.
        for block in blocks:
            reason = fetched.misses.get(block.chunk_id, MissReason.NOT_FOUND)
            if reason is not MissReason.NOT_FOUND:
                report.misses.append(Miss(block.chunk_id, block.kind, reason, block.num_tokens))
