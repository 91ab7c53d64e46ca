"""Requests that come on the stream which carries their answers.

    gateway ── requests, cancelled tags ──▶ a task each ── steps, or why it failed ──▶ AnswerStream ──▶ gateway

A call of its own costs a request wake-ups of gRPC's threads at either end, metadata and a status. Here what it would
bring comes beside the request, which is counted, traced and ended as a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

from spolia.v1.decode_pb2 import GenerateManyRequest, GenerateManyResponse, StreamedRequest
from spolia_core.errors import InternalError, InvalidRequest, SpoliaError, Unavailable
from spolia_decode.answer_streams import AnswerStream
from spolia_node.logs import get_log
from spolia_node.tracing import PARENT_KEY, STATE_KEY, Metadata

Stream = AnswerStream[GenerateManyResponse]

Serve = Callable[[StreamedRequest, Stream], Awaitable[SpoliaError | None]]
"""Works on a request, whose answer goes to the stream. What its caller is to be told where it came to nothing."""

MAX_TOGETHER = 1024
"""Requests of one message, and as many cancels. Small ones take a few bytes on the wire, and a task each here."""

log = get_log(__name__)


class StreamedRequests:
    """Those that came on one stream. One event loop's."""

    def __init__(self, stream: Stream, serve: Serve) -> None:
        self._stream = stream
        self._serve = serve
        self._running: dict[int, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def coming(self, messages: AsyncIterator[GenerateManyRequest]) -> AsyncIterator[None]:
        """Takes what comes while the block runs. All has ended, and is given back, when it has."""
        reading = asyncio.get_running_loop().create_task(self._read(messages))
        try:
            yield
        finally:
            reading.cancel()
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(reading, *self._running.values(), return_exceptions=True)

    def take(self, message: GenerateManyRequest) -> None:
        """Begins what is asked, and ends what nobody wants. Raises `InvalidRequest` for a tag in use,
        and for too many at once.
        """
        for field, num in (("requests", len(message.requests)), ("cancelled_tags", len(message.cancelled_tags))):
            if num > MAX_TOGETHER:
                limit = f"{MAX_TOGETHER} in a message"
                raise InvalidRequest(f"{field} are {num}, {limit} at most", field=field, limit=limit, actual=str(num))
        for streamed in message.requests:
            tag = streamed.request.answer_tag
            if tag in self._running:
                raise InvalidRequest(f"answer_tag {tag} is in use", field="answer_tag", limit="a new tag")
            task = self._running[tag] = asyncio.get_running_loop().create_task(self._run(tag, streamed))
            task.add_done_callback(partial(self._forget, tag))
        for tag in message.cancelled_tags:
            if tag in self._running:
                self._running[tag].cancel()

    async def _read(self, messages: AsyncIterator[GenerateManyRequest]) -> None:
        try:
            async for message in messages:
                self.take(message)
            self._stream.leave()  # nothing more is asked; what was is answered
        except SpoliaError as error:
            self._stream.break_off(error)
        except Exception as error:  # gRPC has its own, of no public class: nobody would hear of it, or ask anything
            log.warning("stream of requests broke", error=repr(error))
            self._stream.break_off(InternalError(f"requests could not be read: {error!r}"))

    async def _run(self, tag: int, streamed: StreamedRequest) -> None:
        with self._stream.carrying():
            error = await self._serve(streamed, self._stream)
            if error is not None:
                with suppress(Unavailable):  # the stream has ended, and its reader knows
                    self._stream.fail(tag, error)

    def _forget(self, tag: int, _task: asyncio.Task[None]) -> None:
        del self._running[tag]


def metadata_of(streamed: StreamedRequest) -> Metadata:
    """What a call of its own would have brought of its trace."""
    told = ((PARENT_KEY, streamed.traceparent), (STATE_KEY, streamed.tracestate))
    return [(key, value) for key, value in told if value]
