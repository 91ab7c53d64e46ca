"""Streams that carry the answers of many requests to one gateway.

    request ── post ──┐
    request ── post ──┼──▶ what is new since the last message ──▶ one message ──▶ gateway
    request ── post ──┘

A message costs the loop nearly as much as all else it does for a token (40 of 93 us): system calls, threads to wake.
Tokens of one step come within one turn of the loop, so they share one; and while a message is being written, what comes
waits for the next. What waits for a gateway that takes nothing is bounded in bytes: then the stream ends, with all that
it carries, as where the gateway has gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Generic, TypeVar

from spolia.errors import detail_of, status_of
from spolia.v1.decode_pb2 import DecodeServiceGenerateResponse, GenerateManyResponse, StreamAnswersResponse
from spolia_core.errors import Busy, InvalidRequest, SpoliaError, Unavailable
from spolia_decode.answer_messages import write_delta
from spolia_engine.generation import Delta
from spolia_node.deadline import Deadline
from spolia_node.interceptor import told_message
from spolia_node.logs import get_log

log = get_log(__name__)

MIN_NAME_BYTES, MAX_NAME_BYTES = 16, 64
MAX_STEPS = 256
"""In a message; and a finish, which may be long, is the last of its message. It bounds the bytes too, as steps are of
`inbox.MAX_TOGETHER` tokens at most: 1.7 MB with 20 alternatives for each, where every node takes messages of 5 MiB. To
weigh each step would cost 0.7 … 1.7 us of 2 … 4."""
MAX_WAITING_BYTES = 64 << 20
"""Of messages that are full and wait for a gateway that reads nothing: minutes of answers, where it is only slow."""

Message = TypeVar("Message", StreamAnswersResponse, GenerateManyResponse)


class AnswerStream(Generic[Message]):
    """One of them, in messages of a kind. One event loop's."""

    def __init__(self, kind: type[Message]) -> None:
        self.num_riders = 0
        """Requests whose answers it carries."""
        self._kind: type[Message] = kind
        self._posted: deque[Message] = deque()
        self._sizes: deque[int] = deque()
        """Bytes of each of them but the last, which still grows."""
        self._waiting_bytes = 0
        self._is_whole = False
        """Whether nothing more goes into the last of them."""
        self._wake: asyncio.Future[None] | None = None
        self._ended = False
        self._leaving = False
        self._error: SpoliaError | None = None

    def post(self, tag: int, step: DecodeServiceGenerateResponse) -> None:
        """Sends a step with the next message. Raises `Unavailable` when the stream has ended, or too much waits."""
        self._open().steps.add(answer_tag=tag, step=step)
        self._is_whole = step.HasField("finish")
        self.look()

    def tell(self, tag: int, delta: Delta) -> None:
        """`post` of a delta, written where it is sent from."""
        write_delta(delta, self._open().steps.add(answer_tag=tag).step.delta)
        self.look()

    def fail(self, tag: int, error: SpoliaError) -> None:
        """Says why a request ended that came on this stream. Raises `Unavailable` when the stream has ended."""
        message = self._open()
        assert isinstance(message, GenerateManyResponse), "requests come on no other stream"
        code: int = status_of(error).value[0]
        message.failures.add(answer_tag=tag, code=code, message=told_message(error), detail=detail_of(error))
        self.look()

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Stays, for one request more, until the block ends or its reader goes."""
        self.num_riders += 1
        try:
            yield
        finally:
            self.num_riders -= 1
            self.look()

    def break_off(self, error: SpoliaError) -> None:
        """Ends it, with all that it carries; its reader gets `error`."""
        self._error = error
        self.look()

    def leave(self) -> None:
        """Ends it when it carries no more answers."""
        self._leaving = True
        self.look()

    def look(self) -> None:
        """Has the writer look whether there is something to do."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def messages(self) -> AsyncGenerator[Message, None]:
        """What to send. Closing it ends the stream. Raises what it was broken off with; `Busy` where its reader took
        too little.
        """
        try:
            yield self._kind()
            while self._error is None and (self._posted or self.num_riders or not self._leaving):
                if self._posted:
                    yield self._next()
                else:
                    self._wake = asyncio.get_running_loop().create_future()
                    await self._wake
            if self._error is not None:
                raise self._error
        finally:
            self._ended = True

    def _open(self) -> Message:
        """The message that the next step goes into."""
        if self._ended:
            raise Unavailable("the stream that carries this answer has ended")
        if not self._posted or self._is_whole or _length(self._posted[-1]) >= MAX_STEPS:
            if self._posted:
                self._weigh(self._posted[-1].ByteSize())
            self._posted.append(self._kind())
            self._is_whole = False
        return self._posted[-1]

    def _next(self) -> Message:
        """The message that has waited longest."""
        if self._sizes:
            self._waiting_bytes -= self._sizes.popleft()
        return self._posted.popleft()

    def _weigh(self, num_bytes: int) -> None:
        """Counts a message that is full: one of many steps, and only where its reader is behind. Raises `Unavailable`
        where too much waits: all that does is forgotten then, and whoever rides on the stream hears that it has ended.
        """
        self._sizes.append(num_bytes)
        self._waiting_bytes += num_bytes
        if self._waiting_bytes <= MAX_WAITING_BYTES:
            return
        what = f"answers of {self._waiting_bytes} bytes wait for a gateway that does not take them"
        limit = f"{MAX_WAITING_BYTES} bytes"
        self._error = Busy(f"{what}; at most {limit} may", limit=limit, actual=f"{self._waiting_bytes} bytes")
        log.warning("stream of answers cut", num_bytes=self._waiting_bytes, num_riders=self.num_riders)
        self._ended = True
        self._posted.clear()
        self._sizes.clear()
        self._waiting_bytes = 0
        self.look()
        raise Unavailable(what)


class AnswerStreams:
    """Those of one node, by name."""

    def __init__(self) -> None:
        self._streams: dict[bytes, AnswerStream[StreamAnswersResponse] | AnswerStream[GenerateManyResponse]] = {}
        self._draining = False

    @contextmanager
    def opened(self, name: bytes, kind: type[Message]) -> Iterator[AnswerStream[Message]]:
        """A new stream, which requests may name while the block runs. Raises `InvalidRequest` for its name."""
        if not MIN_NAME_BYTES <= len(name) <= MAX_NAME_BYTES:
            limit = f"{MIN_NAME_BYTES} … {MAX_NAME_BYTES} bytes"
            raise InvalidRequest(
                f"answer_stream must have {limit}", field="answer_stream", limit=limit, actual=f"{len(name)} bytes"
            )
        if name in self._streams:
            raise InvalidRequest("answer_stream is in use", field="answer_stream", limit="a new name")
        stream = self._streams[name] = AnswerStream(kind)
        if self._draining:
            stream.leave()
        try:
            yield stream
        finally:
            del self._streams[name]

    async def messages(self, name: bytes) -> AsyncGenerator[StreamAnswersResponse, None]:
        """What to send on a new stream, which lives as long as this is read. Raises `InvalidRequest` for its name."""
        with self.opened(name, StreamAnswersResponse) as stream:
            async with aclosing(stream.messages()) as messages:
                async for message in messages:
                    yield message

    @contextmanager
    def riding(
        self, name: bytes
    ) -> Iterator[AnswerStream[StreamAnswersResponse] | AnswerStream[GenerateManyResponse] | None]:
        """The stream that a request names, which stays until the block ends unless its reader goes; None where it is
        not known, or the request names none.
        """
        stream = self._streams.get(name)
        if stream is None:
            yield None
            return
        with stream.carrying():
            yield stream

    async def drain(self, deadline: Deadline) -> None:
        """Ends each stream when it carries no more; waits for none, as the server waits for its calls."""
        self._draining = True
        for stream in self._streams.values():
            stream.leave()


def _length(message: StreamAnswersResponse | GenerateManyResponse) -> int:
    return len(message.steps) + (len(message.failures) if isinstance(message, GenerateManyResponse) else 0)
