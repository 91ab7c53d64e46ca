"""The answers to one request: prepared, decoded, preempted and taken up again, one sample beside the other.

Samples that begin here read one context, held once. A sample that was preempted, or begun on a node that died, reads a
context of its own from then on: prompt and what it has said; what they share of it is found again as chunks.

    all of them new, and room for all   _start_together ─▶ _from, each ──preempted──▶ _later ─▶ _anew
    else                                the first _anew; the others _after_the_first ─▶ _later ─▶ _anew

`_later` waits for blocks; `_anew` prepares a context and decodes, as often as the sample is preempted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial

from spolia_core.errors import Busy, InvalidRequest
from spolia_core.reuse import ReuseMode, ReuseReport
from spolia_decode.admission import Admission, Place
from spolia_decode.answer_sealing import AnswerSealer
from spolia_decode.batch import DecodeBatch, Joined
from spolia_decode.exact import ExactPath
from spolia_decode.inbox import Preempted
from spolia_decode.job import GenerateJob
from spolia_decode.linked import LinkedPath
from spolia_decode.load import num_tokens_to_prepare
from spolia_decode.merged_streams import merged_streams
from spolia_decode.node_parts import NodeParts
from spolia_decode.prepared_context import PreparedContext
from spolia_decode.timings import RequestTimes
from spolia_engine.generation import Delta, Generation
from spolia_engine.grammar import Grammar
from spolia_engine.sequence import Sequence
from spolia_engine.sequence_starts import start_samples
from spolia_node.deadline import Deadline
from spolia_node.tracing import span, span_across_yields

MAX_STARTS = 16
"""Times a context is prepared while others take the room for it each time."""

PAUSE_S = 0.05
"""Between two tries."""
MAX_MORE_BLOCKS = 32
"""Asked for beyond what a context counts."""

Paths = Mapping[ReuseMode, ExactPath | LinkedPath]


@dataclass(frozen=True, slots=True)
class Workplace:
    """What requests are worked on with; one for a node."""

    parts: NodeParts
    batch: DecodeBatch
    admission: Admission
    paths: Paths


class Answering:
    """One request on this node. Read `deltas` once; everything it holds goes with them."""

    def __init__(
        self,
        where: Workplace,
        job: GenerateJob,
        report: ReuseReport,
        deadline: Deadline,
        grammar: Grammar | None = None,
        tell: Callable[[Delta], None] | None = None,
    ) -> None:
        """`report` and `times` are filled as the work goes on; `grammar` is that of the job's constraint.

        `tell`, where there is one, takes the tokens that are decoded here, as they come.
        """
        core = where.parts.core
        self._where = where
        self._job = job
        self._deadline = deadline
        self.report = report
        self._tell = tell
        self.times = RequestTimes()
        self._is_reported = False
        self._prompt_was_read = asyncio.Event()
        self.generations = [core.generation(job.sampling, index, grammar) for index in range(job.sampling.num_samples)]

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The deltas of all samples, each sample's in order, but for those that `tell` takes.

        Raises `Busy` where there is no room, `DeadlineExceeded`, and `InvalidRequest` for ids behind an answer's end.
        """
        for generation in self.generations:
            stood = self._job.where(generation.sample_index)
            left_over = generation.resume(stood.token_ids, stood.num_code_points)
            if left_over is not None:
                # The node that died had drawn the last token: what is left is to say so. No prompt is read for that.
                yield left_over
        unfinished = [generation for generation in self.generations if generation.finish_reason is None]
        if not unfinished:
            return
        parts = self._where.parts
        self._check_fits()
        # Those that went on elsewhere read contexts of their own, one after the other.
        together = unfinished if not any(g.token_ids for g in unfinished) else unfinished[:1]
        job = self._job.resumed(together[0].token_ids)
        num_tokens, num_blocks = num_tokens_to_prepare(job, parts.core.resident), self._num_blocks(job, together)
        num_places = len(unfinished)
        async with self._where.admission.place(self._deadline, num_tokens, num_blocks, num_places) as place:
            self.times.work_began()
            async with aclosing(self._samples(unfinished, place)) as deltas:
                async for delta in deltas:
                    self.times.token_came()
                    yield delta

    async def _samples(self, generations: list[Generation], place: Place) -> AsyncGenerator[Delta, None]:
        """Deltas of those that are not whole yet, beginning under one place."""
        started = await self._start_together(generations) if len(generations) > 1 else None
        with ExitStack() as held:
            places = [place, *(held.enter_context(place.another()) for _ in generations[1:])]
            if started is not None:
                joined = self._join(*started, places)
                for each in joined:
                    held.callback(each.leave)
                streams = [self._from(j, g, p) for j, g, p in zip(joined, generations, places, strict=True)]
            else:
                # The first has its place. The others wait until what it computed can be found, then for blocks of
                # their own, as if they had been preempted.
                streams = [self._anew(self._job, generations[0], place)]
                streams += [self._after_the_first(g, p) for g, p in zip(generations[1:], places[1:], strict=True)]
            there = [_holding(p, stream) for p, stream in zip(places, streams, strict=True)]
            async with aclosing(merged_streams(there)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _start_together(self, generations: list[Generation]) -> tuple[list[Sequence], PreparedContext] | None:
        """Sequences of one context, where none has said anything and the pool has room for all; else None."""
        if any(generation.token_ids for generation in generations):
            return None
        try:
            return await self._start(self._job, generations, self.report)
        except Busy:
            _begin_again(self.report)
            return None

    def _join(self, sequences: list[Sequence], prepared: PreparedContext, places: list[Place]) -> list[Joined]:
        """Samples of one context, in the batch."""
        self._is_reported = True
        self.times.computed(prepared.compute_s)
        return [
            self._where.batch.join(sequence, self._sealer(self._job, prepared, sequence), place.number)
            for sequence, place in zip(sequences, places, strict=True)
        ]

    async def _from(self, joined: Joined, generation: Generation, place: Place) -> AsyncGenerator[Delta, None]:
        """A sample's deltas, from a sequence that was made for it."""
        try:
            async with aclosing(self._decoded(joined, generation, place)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        except Preempted:
            pass
        async with aclosing(self._later(generation, place)) as deltas:
            async for delta in deltas:
                yield delta

    async def _decoded(self, joined: Joined, generation: Generation, place: Place) -> AsyncGenerator[Delta, None]:
        """The deltas of a sequence in the batch, unless they are told."""
        num_before = len(generation.token_ids)
        if self._tell is not None:
            joined.inbox.pour(partial(self._told, self._tell, place))
        with span_across_yields("decode", sample_index=generation.sample_index) as decoding:
            try:
                async with aclosing(joined.deltas(self._deadline)) as deltas:
                    async for delta in deltas:
                        yield delta
            finally:
                decoding.set(num_tokens=len(generation.token_ids) - num_before)

    def _told(self, tell: Callable[[Delta], None], place: Place, delta: Delta) -> None:
        self.times.token_came()
        place.decodes()
        tell(delta)

    async def _after_the_first(self, generation: Generation, place: Place) -> AsyncGenerator[Delta, None]:
        """A sample's deltas once another has read the prompt, or failed to."""
        await self._deadline.wait(self._prompt_was_read.wait(), "waiting for the first sample's context")
        async with aclosing(self._later(generation, place)) as deltas:
            async for delta in deltas:
                yield delta

    async def _later(self, generation: Generation, place: Place) -> AsyncGenerator[Delta, None]:
        """A sample's deltas once there are blocks for it."""
        await self._wait_again(self._job, generation, place)
        async with aclosing(self._anew(self._job, generation, place)) as deltas:
            async for delta in deltas:
                yield delta

    async def _anew(self, job: GenerateJob, generation: Generation, place: Place) -> AsyncGenerator[Delta, None]:
        """A sample's deltas from where it stands, over every time that it is preempted and resumed."""
        while True:
            report = self._next_report()
            job = job.resumed(generation.token_ids)
            try:
                sequences, prepared = await self._start_when_there_is_room(job, [generation], report, place)
                self.times.computed(prepared.compute_s)
                self._prompt_was_read.set()
                joined = self._where.batch.join(sequences[0], self._sealer(job, prepared, sequences[0]), place.number)
                async with aclosing(self._decoded(joined, generation, place)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except Preempted:
                await self._wait_again(job, generation, place)
            finally:
                self._prompt_was_read.set()
                if report is not self.report:
                    self.report.count_transfers(report)

    async def _wait_again(self, job: GenerateJob, generation: Generation, place: Place) -> None:
        """Waits for the blocks to go on with a preempted sample."""
        await place.wait_again(self._num_blocks(job.resumed(generation.token_ids), [generation]), self._deadline)

    def _next_report(self) -> ReuseReport:
        """The request's for the context that is read first; a further one says nothing but what it moved."""
        if self._is_reported:
            return ReuseReport(self._job.mode)
        self._is_reported = True
        return self.report

    def _sealer(self, job: GenerateJob, prepared: PreparedContext, sequence: Sequence) -> AnswerSealer:
        is_first = sequence.generation.sample_index == 0
        return AnswerSealer(job, self._where.parts, prepared.continuation, offers_check=is_first)

    async def _start_when_there_is_room(
        self, job: GenerateJob, generations: list[Generation], report: ReuseReport, place: Place
    ) -> tuple[list[Sequence], PreparedContext]:
        """`_start`, once more in its turn where sequences that decode took the blocks it was promised.

        Raises `Busy` when that came to nothing too often in a row.
        """
        pool = self._where.parts.core.pool
        for attempt in range(MAX_STARTS - 1):
            try:
                return await self._start(job, generations, report)
            except Busy:
                # What is sealed or stored in the background comes free without anybody's saying so.
                await self._deadline.wait(asyncio.sleep(PAUSE_S), "waiting for blocks")
            _begin_again(report)
            # Chunks may lie in more blocks than they count: ask for more each time.
            more = min(1 << attempt, MAX_MORE_BLOCKS)
            num_blocks = min(self._num_blocks(job, generations) + more, pool.num_blocks)
            await place.wait_again(num_blocks, self._deadline)
        return await self._start(job, generations, report)

    async def _start(
        self, job: GenerateJob, generations: list[Generation], report: ReuseReport
    ) -> tuple[list[Sequence], PreparedContext]:
        """A sequence for each, of the job's context, and what was prepared for them.

        Where the pool has no room, shadow checks give up what they hold and the context is prepared once more.
        """
        shadow = self._where.parts.shadow
        if shadow is None:
            return await self._try_start(job, generations, report)
        async with shadow.starting(self._num_blocks(job, generations), self._deadline):
            while True:
                num_ended = shadow.num_ended
                try:
                    return await self._try_start(job, generations, report)
                except Busy:
                    if not await shadow.give_way(num_ended, self._deadline):
                        raise
                _begin_again(report)

    async def _try_start(
        self, job: GenerateJob, generations: list[Generation], report: ReuseReport
    ) -> tuple[list[Sequence], PreparedContext]:
        with span("prepare", mode=job.mode.name.lower(), num_tokens=job.context.num_tokens) as preparing:
            prepared = await self._where.paths[job.mode].prepare(job, report, self._deadline)
            preparing.set(**{f"num_{source.name.lower()}_tokens": count for source, count in report.sources.items()})
        return start_samples(prepared.context, generations), prepared

    def _num_blocks(self, job: GenerateJob, generations: list[Generation]) -> int:
        """Blocks that samples take at most until each has a token: the context's once, and a tail's first."""
        pool = self._where.parts.core.pool
        tails = (pool.blocks_to_open(generation.max_tail_tokens) for generation in generations)
        return self._where.paths[job.mode].blocks_to_take(job) + sum(tails)

    def _check_fits(self) -> None:
        """Refuses what would find no room in an empty pool either, one sample after the other; names the answer where
        the prompt alone would fit.
        """
        job, pool = self._job, self._where.parts.core.pool
        context_blocks = self._where.paths[job.mode].min_blocks(job)
        needed = context_blocks + pool.blocks_for(job.max_new_tokens)
        if needed > pool.num_blocks:
            room = (pool.num_blocks - context_blocks) * pool.block_size
            raise InvalidRequest(
                f"prompt and answer need {needed} blocks of KV, this node has {pool.num_blocks}",
                field="sampling.max_tokens" if room > 0 else "parts",
                limit=f"{room} tokens" if room > 0 else f"{pool.num_blocks} blocks",
                actual=f"{job.max_new_tokens} tokens" if room > 0 else f"{needed} blocks",
            )


async def _holding(place: Place, stream: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """A sample's deltas; its place goes with the last."""
    try:
        async with aclosing(stream):
            async for delta in stream:
                place.decodes()
                yield delta
    finally:
        place.leave()


def _begin_again(report: ReuseReport) -> None:
    """Forgets what a try that came to nothing found. The bytes it moved stay counted."""
    report.sources.clear()
    report.runs.clear()
    report.misses.clear()
