"""PrefillService over gRPC: one job per stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from structlog.contextvars import bind_contextvars

from spolia.v1.prefill_pb2 import (
    PrefillRequest,
    PrefillResponse,
    PrefillServiceDropRequest,
    PrefillServiceDropResponse,
)
from spolia.v1.prefill_pb2_grpc import PrefillServiceServicer
from spolia_core.errors import Busy, Cancelled, DeadlineExceeded, InvalidRequest
from spolia_engine.core import EngineCore
from spolia_node.deadline import Deadline
from spolia_node.tracing import current_span
from spolia_prefill.compile import Compiler
from spolia_prefill.config import PrefillConfig
from spolia_prefill.context import ContextPrefiller
from spolia_prefill.handoff import Acknowledgements
from spolia_prefill.link import Linker
from spolia_prefill.progress import Progress
from spolia_prefill.work import CompileJob, ContextJob, Job, LinkJob, check_start

PrefillContext = grpc.aio.ServicerContext[PrefillRequest, PrefillResponse]
DropContext = grpc.aio.ServicerContext[PrefillServiceDropRequest, PrefillServiceDropResponse]


class PrefillServer(PrefillServiceServicer):
    """Translates streams into jobs and counts them; decides nothing."""

    def __init__(
        self,
        config: PrefillConfig,
        core: EngineCore,
        compiler: Compiler,
        prefiller: ContextPrefiller,
        linker: Linker,
        check_accepting: Callable[[], None],
    ) -> None:
        """`check_accepting` raises while the node drains."""
        self._config = config
        self._core = core
        self._compiler = compiler
        self._prefiller = prefiller
        self._linker = linker
        self._check_accepting = check_accepting
        self._running: set[Progress] = set()

    @property
    def num_running(self) -> int:
        """Jobs under way."""
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """What jobs under way have still to compute. From any thread."""
        return sum(progress.tokens_left for progress in list(self._running))

    async def Prefill(
        self, request_iterator: AsyncIterator[PrefillRequest], context: PrefillContext
    ) -> AsyncIterator[PrefillResponse]:
        """Runs the job the first message names; see prefill.proto."""
        self._check_accepting()
        deadline = Deadline.of(context, self._config.rpc_timeout_s)
        job = await deadline.wait(self._first(request_iterator), "the start message")
        with self._counted(job) as progress:
            acks = Acknowledgements(self._config.ack_lease_s)
            reading = asyncio.create_task(_read(request_iterator, acks))
            running = self._run(job, acks, progress, deadline)
            try:
                async for response in _until_stopped(running, reading, acks, deadline):
                    yield response
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                await running.aclose()

    async def Drop(self, request: PrefillServiceDropRequest, context: DropContext) -> PrefillServiceDropResponse:
        """Forgets resident chunks; ids are keyed by tenant, so no other tenant's can be named."""
        dropped = sum(self._core.resident.drop(chunk_id) for chunk_id in request.chunk_ids)
        return PrefillServiceDropResponse(num_dropped=dropped)

    async def _first(self, requests: AsyncIterator[PrefillRequest]) -> Job:
        request = await anext(aiter(requests), None)
        if request is None or request.WhichOneof("message") != "start":
            raise InvalidRequest("the first message must be a start message", field="message", limit="start")
        bind_contextvars(request_id=request.start.request_id)
        job = check_start(request.start, self._core, self._config.cluster_secret.encode())
        current_span().set(request_id=job.request_id, job=type(job).__name__, num_tokens=sum(job.part_tokens))
        return job

    @contextmanager
    def _counted(self, job: Job) -> Iterator[Progress]:
        """Holds a place for a job. Raises `Busy` when there is none."""
        if self.num_running >= self._config.max_running:
            limit = str(self._config.max_running)
            raise Busy("all places are taken", field="max_running", limit=limit, retry_after_ms=200)
        progress = Progress(job.part_tokens)
        self._running.add(progress)
        try:
            yield progress
        finally:
            self._running.remove(progress)

    def _run(
        self, job: Job, acks: Acknowledgements, progress: Progress, deadline: Deadline
    ) -> AsyncGenerator[PrefillResponse, None]:
        match job:
            case CompileJob():
                return self._compiler.run(job, progress, deadline)
            case LinkJob():
                return self._linker.run(job, acks, progress, deadline)
            case ContextJob():
                return self._prefiller.run(job, acks, progress, deadline)


async def _read(requests: AsyncIterator[PrefillRequest], acks: Acknowledgements) -> str:
    """Feeds acknowledgements until the caller is done; returns why it stopped."""
    async for request in requests:
        match request.WhichOneof("message"):
            case "ack":
                acks.acknowledge(request.ack.slice, request.ack.layer)
            case "cancel":
                return request.cancel.reason or "cancelled by the caller"
            case other:
                raise InvalidRequest(
                    f"{other} is not expected here", field="message", limit="ack or cancel", actual=str(other)
                )
    return "the caller closed the stream"


async def _until_stopped(
    running: AsyncGenerator[PrefillResponse, None],
    reading: asyncio.Task[str],
    acks: Acknowledgements,
    deadline: Deadline,
) -> AsyncIterator[PrefillResponse]:
    """What `running` yields, until it ends or the caller stops it.

    Raises `Cancelled` when the caller left before it had everything, `DeadlineExceeded`, or what reading raised.
    """
    while True:
        step = asyncio.ensure_future(anext(running, None))
        try:
            await _wait(step, reading, acks, deadline)
            response = step.result()
        finally:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)
        if response is None:
            return
        yield response


async def _wait(
    step: asyncio.Future[PrefillResponse | None],
    reading: asyncio.Task[str],
    acks: Acknowledgements,
    deadline: Deadline,
) -> None:
    """Returns when `step` is done. Raises as `_until_stopped` does."""
    while not step.done():
        if reading.done():  # looked at before the wait: it may have ended while the last response was written
            reason = reading.result()
            if not acks.complete:
                raise Cancelled(reason)
        waited: set[asyncio.Future[Any]] = {step} if reading.done() else {step, reading}
        done, _ = await asyncio.wait(waited, timeout=deadline.remaining(), return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise DeadlineExceeded("prefill ran out of time")
