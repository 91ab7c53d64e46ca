"""DecodeService over gRPC: the life of a request on its decode node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

import grpc
from structlog.contextvars import bind_contextvars

from spolia.v1.decode_pb2 import (
    DESCRIPTOR,
    DecodeServiceGenerateRequest,
    DecodeServiceGenerateResponse,
    DropRequest,
    DropResponse,
    GenerateManyRequest,
    GenerateManyResponse,
    StreamAnswersRequest,
    StreamAnswersResponse,
    StreamedRequest,
)
from spolia.v1.decode_pb2_grpc import DecodeServiceServicer
from spolia_core.errors import SpoliaError
from spolia_core.reuse import ReuseMode, ReuseReport
from spolia_decode.admission import Admission
from spolia_decode.answer_messages import delta_message, finish_message
from spolia_decode.answer_streams import AnswerStreams
from spolia_decode.answering import Answering, Workplace
from spolia_decode.batch import DecodeBatch
from spolia_decode.exact import ExactPath
from spolia_decode.job import GenerateJob, check_job
from spolia_decode.linked import LinkedPath
from spolia_decode.node_parts import NodeParts
from spolia_decode.streamed_requests import Stream, StreamedRequests, metadata_of
from spolia_engine.generation import Delta
from spolia_engine.grammar import Grammar
from spolia_node.deadline import Deadline
from spolia_node.tracing import Metadata, current_span

GenerateContext = grpc.aio.ServicerContext[DecodeServiceGenerateRequest, DecodeServiceGenerateResponse]
StreamAnswersContext = grpc.aio.ServicerContext[StreamAnswersRequest, StreamAnswersResponse]
GenerateManyContext = grpc.aio.ServicerContext[GenerateManyRequest, GenerateManyResponse]
DropContext = grpc.aio.ServicerContext[DropRequest, DropResponse]

GENERATE = f"/{DESCRIPTOR.services_by_name['DecodeService'].full_name}/Generate"

RunInside = Callable[[str, Metadata, Awaitable[None]], Awaitable[SpoliaError | None]]
"""`NodeServer.run_inside`."""


class DecodeServer(DecodeServiceServicer):
    """Checks requests and says what comes of them."""

    def __init__(
        self,
        parts: NodeParts,
        batch: DecodeBatch,
        admission: Admission,
        check_accepting: Callable[[], None],
        run_inside: RunInside,
    ) -> None:
        """`check_accepting` raises while the node drains; `run_inside` is where requests run that come on a stream."""
        paths: dict[ReuseMode, ExactPath | LinkedPath] = {
            ReuseMode.EXACT: ExactPath(parts),
            ReuseMode.LINKED: LinkedPath(parts),
        }
        self._where = Workplace(parts, batch, admission, paths)
        self._check_accepting = check_accepting
        self._run_inside = run_inside
        self.answer_streams = AnswerStreams()

    async def Generate(
        self, request: DecodeServiceGenerateRequest, context: GenerateContext
    ) -> AsyncGenerator[DecodeServiceGenerateResponse, None]:
        """Streams an answer, here or on the stream that the request names; see decode.proto."""
        self._check_accepting()
        with self.answer_streams.riding(request.answer_stream) as stream:
            tell = None if stream is None else partial(stream.tell, request.answer_tag)
            deadline = Deadline.of(context, self._where.parts.config.rpc_timeout_s)
            async with aclosing(self._answer(request, deadline, tell)) as steps:
                async for step in steps:
                    if stream is None:
                        yield step
                    else:
                        stream.post(request.answer_tag, step)

    async def StreamAnswers(
        self, request: StreamAnswersRequest, context: StreamAnswersContext
    ) -> AsyncGenerator[StreamAnswersResponse, None]:
        """Streams what is new of the answers that name this stream."""
        async with aclosing(self.answer_streams.messages(request.answer_stream)) as messages:
            async for message in messages:
                yield message

    async def GenerateMany(
        self, requests: AsyncIterator[GenerateManyRequest], context: GenerateManyContext
    ) -> AsyncGenerator[GenerateManyResponse, None]:
        """Streams what is new of the answers to the requests that come on this stream, or name it."""
        named = Deadline.after(self._where.parts.config.rpc_timeout_s)
        first = await named.wait(anext(requests, None), "waiting for the stream's name")
        if first is None:
            return
        with self.answer_streams.opened(first.answer_stream, GenerateManyResponse) as stream:
            asked = StreamedRequests(stream, self._serve)
            async with asked.coming(requests), aclosing(stream.messages()) as messages:
                asked.take(first)
                async for message in messages:
                    yield message

    async def _serve(self, streamed: StreamedRequest, stream: Stream) -> SpoliaError | None:
        return await self._run_inside(GENERATE, metadata_of(streamed), self._post(streamed, stream))

    async def _post(self, streamed: StreamedRequest, stream: Stream) -> None:
        """The whole answer, onto the stream."""
        self._check_accepting()
        request, default_s = streamed.request, self._where.parts.config.rpc_timeout_s
        deadline = Deadline.after(streamed.time_left_ms / 1e3 if streamed.time_left_ms else default_s)
        async with aclosing(self._answer(request, deadline, partial(stream.tell, request.answer_tag))) as steps:
            async for step in steps:
                stream.post(request.answer_tag, step)

    async def _answer(
        self, request: DecodeServiceGenerateRequest, deadline: Deadline, tell: Callable[[Delta], None] | None
    ) -> AsyncGenerator[DecodeServiceGenerateResponse, None]:
        """The steps of an answer, but for what `tell` is told as it comes."""
        bind_contextvars(request_id=request.request_id)
        parts = self._where.parts
        job = check_job(request, parts.core, parts.terms, parts.config.cluster_secret.encode())
        current_span().set(
            request_id=job.request_id,
            mode=job.mode.name.lower(),
            num_prompt_tokens=job.prompt.num_tokens,
            is_replay=request.HasField("resume"),
        )
        grammar = await self._grammar(job, deadline)
        answering = Answering(self._where, job, _new_report(job, parts), deadline, grammar, tell)
        async with aclosing(answering.deltas()) as deltas:
            async for delta in deltas:
                yield DecodeServiceGenerateResponse(delta=delta_message(delta))
        finish = finish_message(job, answering)
        parts.request_metrics.finished(job.mode, finish.timings)
        current_span().set(
            num_generated_tokens=finish.num_generated_tokens, num_reused_tokens=answering.report.num_reused_tokens
        )
        yield DecodeServiceGenerateResponse(finish=finish)

    async def _grammar(self, job: GenerateJob, deadline: Deadline) -> Grammar | None:
        """That of the job's constraint. Compiled beside the event loop and the engine's thread."""
        if job.sampling.constraint is None:
            return None
        compiling = asyncio.to_thread(self._where.parts.core.compile_constraint, job.sampling)
        return await deadline.wait(compiling, "compiling the constraint")

    async def Drop(self, request: DropRequest, context: DropContext) -> DropResponse:
        """Forgets resident chunks; ids are keyed by tenant, so no other tenant's can be named."""
        dropped = sum(self._where.parts.core.resident.drop(chunk_id) for chunk_id in request.chunk_ids)
        return DropResponse(num_dropped=dropped)


def _new_report(job: GenerateJob, parts: NodeParts) -> ReuseReport:
    """What every answer says of the terms it was given on, also one that a replay only had to end."""
    report = ReuseReport(job.mode, profile=parts.terms.profile, nodes=[parts.config.node_id], forced=job.forced)
    if job.mode is ReuseMode.LINKED:
        report.link_tokens_per_chunk = parts.terms.policy.num_link_tokens
        report.sink_tokens_per_chunk = parts.terms.policy.num_sink_tokens
    return report
