"""DecodeService over gRPC: the life of a request on its decode node."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import grpc
from structlog.contextvars import bind_contextvars

from spolia.v1.common_pb2 import Finish, TokenDelta
from spolia.v1.common_pb2 import FinishReason as FinishReasonPb
from spolia.v1.decode_pb2 import (
    DecodeServiceGenerateRequest,
    DecodeServiceGenerateResponse,
    DropRequest,
    DropResponse,
)
from spolia.v1.decode_pb2_grpc import DecodeServiceServicer
from spolia_core.errors import Busy, InvalidRequest
from spolia_core.reuse import ReuseMode, ReuseReport
from spolia_decode.admission import Admission, Place
from spolia_decode.batch import DecodeBatch, Preempted
from spolia_decode.exact import ExactPath
from spolia_decode.job import GenerateJob, check_job
from spolia_decode.linked import LinkedPath
from spolia_decode.load import num_tokens_to_prepare
from spolia_decode.node_parts import NodeParts
from spolia_decode.prepared import Prepared
from spolia_decode.sealing import AnswerSealer, offer_check
from spolia_decode.timings import RequestTimes
from spolia_engine.generation import Delta, Generation
from spolia_engine.pool import Pool
from spolia_engine.sequence import Sequence
from spolia_node.deadline import Deadline
from spolia_node.rpc_messages import report_to_pb

GenerateContext = grpc.aio.ServicerContext[DecodeServiceGenerateRequest, DecodeServiceGenerateResponse]
DropContext = grpc.aio.ServicerContext[DropRequest, DropResponse]

MAX_STARTS = 16
"""Times a context is prepared while others take the room for it each time."""


class DecodeServer(DecodeServiceServicer):
    """Runs requests: admit, prepare, decode, seal."""

    def __init__(
        self, parts: NodeParts, batch: DecodeBatch, admission: Admission, check_accepting: Callable[[], None]
    ) -> None:
        """`check_accepting` raises while the node drains."""
        self._parts = parts
        self._batch = batch
        self._admission = admission
        self._check_accepting = check_accepting
        self._paths: dict[ReuseMode, ExactPath | LinkedPath] = {
            ReuseMode.EXACT: ExactPath(parts),
            ReuseMode.LINKED: LinkedPath(parts),
        }

    async def Generate(
        self, request: DecodeServiceGenerateRequest, context: GenerateContext
    ) -> AsyncIterator[DecodeServiceGenerateResponse]:
        """Streams an answer; see decode.proto."""
        times = RequestTimes()
        self._check_accepting()
        bind_contextvars(request_id=request.request_id)
        deadline = Deadline.of(context, self._parts.config.rpc_timeout_s)
        secret = self._parts.config.cluster_secret.encode()
        job = check_job(request, self._parts.core, self._parts.terms, secret)
        report = _new_report(job, self._parts)
        generation = self._parts.core.generation(job.sampling)
        left_over = generation.resume(job.received_ids, job.received_code_points)
        if left_over is not None:
            # The node that died had drawn the last token: what is left is to say so. No prompt is read for that.
            yield DecodeServiceGenerateResponse(delta=_delta_message(left_over))
        else:
            _check_fits(self._paths[job.mode].min_blocks(job), job, self._parts.core.pool)
            num_tokens = num_tokens_to_prepare(job, self._parts.core.resident)
            async with self._admission.place(deadline, num_tokens, self._num_blocks(job)) as place:
                times.work_began()
                async with aclosing(self._answer(job, generation, report, times, deadline, place)) as deltas:
                    async for delta in deltas:
                        place.decodes()
                        times.token_came()
                        yield DecodeServiceGenerateResponse(delta=_delta_message(delta))
        yield DecodeServiceGenerateResponse(finish=_finish_message(job, generation, report, times))

    async def Drop(self, request: DropRequest, context: DropContext) -> DropResponse:
        """Forgets resident chunks; ids are keyed by tenant, so no other tenant's can be named."""
        dropped = sum(self._parts.core.resident.drop(chunk_id) for chunk_id in request.chunk_ids)
        return DropResponse(num_dropped=dropped)

    def _num_blocks(self, job: GenerateJob) -> int:
        """Blocks that a request takes at most until its first token."""
        return self._paths[job.mode].blocks_to_take(job) + 1

    async def _answer(
        self,
        job: GenerateJob,
        generation: Generation,
        report: ReuseReport,
        times: RequestTimes,
        deadline: Deadline,
        place: Place,
    ) -> AsyncGenerator[Delta, None]:
        """The answer's deltas, over every time that it is preempted and resumed."""
        current = report
        while True:
            try:
                async with aclosing(self._decode(job, generation, current, times, deadline, place)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except Preempted:
                job = job.resumed(generation.token_ids)
            finally:
                if current is not report:
                    report.count_transfers(current)
            current = ReuseReport(job.mode)
            await place.wait_again(self._num_blocks(job), deadline)

    async def _decode(
        self,
        job: GenerateJob,
        generation: Generation,
        report: ReuseReport,
        times: RequestTimes,
        deadline: Deadline,
        place: Place,
    ) -> AsyncGenerator[Delta, None]:
        """The answer's deltas until it ends, or `Preempted`. Whatever ends it, everything it held is given back."""
        sequence, prepared = await self._start_when_there_is_room(job, generation, report, deadline, place)
        times.computed(prepared.compute_s)
        owned = True
        try:
            yield generation.accept(prepared.first_token)
            if sequence.finished:
                offer_check(job, sequence, self._parts)
            else:
                owned = False  # the batch closes it, between two steps
                seal = AnswerSealer(job, self._parts, prepared.continuation)
                async with aclosing(self._batch.stream(sequence, seal, deadline, place.number)) as deltas:
                    async for delta in deltas:
                        yield delta
        finally:
            if owned:
                sequence.close()

    async def _start_when_there_is_room(
        self, job: GenerateJob, generation: Generation, report: ReuseReport, deadline: Deadline, place: Place
    ) -> tuple[Sequence, Prepared]:
        """`_start`, once more in its turn where sequences that decode took the blocks it was promised.

        Raises `Busy` where nobody else is here to give any back, or too often in a row.
        """
        for _ in range(MAX_STARTS - 1):
            try:
                return await self._start(job, generation, report, deadline)
            except Busy:
                if self._admission.num_running == 1:
                    raise
            _begin_again(report)
            await place.wait_again(self._num_blocks(job), deadline)
        return await self._start(job, generation, report, deadline)

    async def _start(
        self, job: GenerateJob, generation: Generation, report: ReuseReport, deadline: Deadline
    ) -> tuple[Sequence, Prepared]:
        """A sequence of the job's context, and what was prepared for it.

        Where the pool has no room, shadow checks give up what they hold and the context is prepared once more.
        """
        shadow = self._parts.shadow
        if shadow is None:
            return await self._try_start(job, generation, report, deadline)
        async with shadow.starting(self._num_blocks(job), deadline):
            while True:
                num_ended = shadow.num_ended
                try:
                    return await self._try_start(job, generation, report, deadline)
                except Busy:
                    if not await shadow.give_way(num_ended, deadline):
                        raise
                _begin_again(report)

    async def _try_start(
        self, job: GenerateJob, generation: Generation, report: ReuseReport, deadline: Deadline
    ) -> tuple[Sequence, Prepared]:
        prepared = await self._paths[job.mode].prepare(job, report, deadline)
        return self._parts.core.start(prepared.context, generation), prepared


def _begin_again(report: ReuseReport) -> None:
    """Forgets what a try that came to nothing found. The bytes it moved stay counted."""
    report.sources.clear()
    report.misses.clear()


def _new_report(job: GenerateJob, parts: NodeParts) -> ReuseReport:
    """What every answer says of the terms it was given on, also one that a replay only had to end."""
    report = ReuseReport(job.mode, profile=parts.terms.profile, nodes=[parts.config.node_id], forced=job.forced)
    if job.mode is ReuseMode.LINKED:
        report.link_tokens_per_chunk = parts.terms.policy.num_link_tokens
        report.sink_tokens_per_chunk = parts.terms.policy.num_sink_tokens
    return report


def _check_fits(context_blocks: int, job: GenerateJob, pool: Pool) -> None:
    """Refuses what would find no room in an empty pool either; names the answer where the prompt alone would fit."""
    needed = context_blocks + pool.blocks_for(job.max_new_tokens)
    if needed > pool.num_blocks:
        room = (pool.num_blocks - context_blocks) * pool.block_size
        raise InvalidRequest(
            f"prompt and answer need {needed} blocks of KV, this node has {pool.num_blocks}",
            field="sampling.max_tokens" if room > 0 else "parts",
            limit=f"{room} tokens" if room > 0 else f"{pool.num_blocks} blocks",
            actual=f"{job.max_new_tokens} tokens" if room > 0 else f"{needed} blocks",
        )


def _delta_message(delta: Delta) -> TokenDelta:
    return TokenDelta(
        token_index=delta.token_index, token_ids=delta.token_ids, text=delta.text, text_offset=delta.text_offset
    )


def _finish_message(job: GenerateJob, generation: Generation, report: ReuseReport, times: RequestTimes) -> Finish:
    assert generation.finish_reason is not None
    return Finish(
        reason=FinishReasonPb.ValueType(generation.finish_reason),
        num_prompt_tokens=job.prompt.num_tokens,
        num_generated_tokens=len(generation.token_ids),
        reuse=report_to_pb(report),
        timings=times.so_far(),
        seed=job.sampling.seed,
    )
