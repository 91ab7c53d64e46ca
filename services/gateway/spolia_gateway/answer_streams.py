"""Answers as decode nodes send them: many on one stream of a connection, a message for all that is new.

    decode ── steps of many answers, tagged ──▶ AnswerStreams ──▶ inbox of a request ──▶ who reads its answer
           ◀─ requests, and their ends ──────── Outgoing
           ── a call of a request's own: its end, and errors ───────▲

A stream is opened when a connection is first used; until the node has said that it knows it, and where a node does not,
requests go by calls of their own, and their answers come on these. A node of an older release takes no requests on the
stream: they go by calls, and name it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import grpc

from spolia.v1 import decode_pb2, decode_pb2_grpc
from spolia_core.errors import Unavailable
from spolia_gateway.backlog import Backlog, Pace
from spolia_gateway.failures import RequestFailed
from spolia_gateway.outgoing import Outgoing
from spolia_node.channels import ChannelPool
from spolia_node.logs import get_log

Step = decode_pb2.DecodeServiceGenerateResponse

NAME_BYTES = 16
LATE_S = 5.0
"""How long the last steps of an answer may come after its call has ended: they are on their way by then."""
PAUSE_S = 1.0
"""Before a stream that ended is opened anew."""
MAX_WAITING = 64
"""Steps that wait for a reader as they came; more become a backlog."""

log = get_log(__name__)


class AnswerBroken(Unavailable):
    """The way on which an answer comes is gone; what came of it stands."""


class Inbox:
    """What has come of one answer and was not read yet: twice `MAX_BACKLOG_BYTES` at most."""

    def __init__(self, stream: bytes = b"", tag: int = 0, outgoing: Outgoing | None = None) -> None:
        """`stream` and `tag` are for the request to name; without them all comes on its call. `outgoing` takes it where
        the stream takes requests.
        """
        self.stream = stream
        self.tag = tag
        self.outgoing = outgoing
        self.comes_whole = False
        """The request went on the stream: its end comes there too."""
        self.has_ended = False
        """The stream has said how the answer ended."""
        self.pace = Pace.KEPT_UP
        self.on_ended: Callable[[], object] = lambda: None
        """Called when its reader turns out to be too slow: more of the answer is of no use."""
        self._items: deque[Step | Exception | None] = deque()
        self._backlog: Backlog | None = None
        """Comes after the items."""
        self._wake: asyncio.Future[None] | None = None

    def put(self, item: Step | Exception | None) -> None:
        """Adds a step, or what ended the answer; None: its call has ended well."""
        if self._backlog is not None or len(self._items) >= MAX_WAITING:
            self._fall_behind(item)
            return  # who has items to read waits for none
        self._items.append(item)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def take(self, step: Step) -> None:
        """A step came on the stream."""
        self.put(step)
        if self.comes_whole and step.HasField("finish"):
            self.end(None)

    def end(self, how: Exception | None) -> None:
        """Nothing more comes on the stream; None: the answer is whole."""
        self.has_ended = True
        self.put(how)

    async def follow(self, call: AsyncIterable[Step]) -> None:
        """Puts what comes on the request's own call, and how that ends."""
        try:
            async for step in call:
                self.put(step)
        except grpc.RpcError as error:
            self.put(error)
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            self.put(AnswerBroken(f"the connection was closed: {error}"))
        except asyncio.CancelledError:  # a closed channel cancels its calls; where it was this task, nobody reads
            self.put(AnswerBroken("the connection was closed"))
            raise
        except Exception as error:  # gRPC has others, of no public class; who reads would hear of nothing, and wait
            self.put(error)
        else:
            self.put(None)

    async def steps(self) -> AsyncGenerator[Step, None]:
        """The answer, to its end: the finish has come, and the call has ended. Ends too when the finish does not come.

        Raises what ended it, after the steps before.
        """
        is_whole = has_ended = False
        while not (is_whole and has_ended):
            try:
                item = await self._take(LATE_S if has_ended else None)
            except TimeoutError:
                return
            if isinstance(item, Exception):
                raise item
            if item is None:
                has_ended = True
                if not self.stream:
                    return
                continue
            is_whole |= item.HasField("finish")
            yield item

    async def _take(self, limit_s: float | None) -> Step | Exception | None:
        """Raises `TimeoutError`."""
        while not self._items:
            if self._backlog is not None:
                self._items, self._backlog = self._backlog.items, None
                continue
            self._wake = asyncio.get_running_loop().create_future()
            if limit_s is None:
                await self._wake
            else:
                async with asyncio.timeout(limit_s):
                    await self._wake
        return self._items.popleft()

    def _fall_behind(self, item: Step | Exception | None) -> None:
        if self.pace is Pace.ENDED:
            return
        if self._backlog is None:
            self._backlog = Backlog()
        self._backlog.put(item)
        self.pace = self._backlog.pace
        if self.pace is Pace.ENDED:
            self.on_ended()


@dataclass(slots=True, eq=False)
class _Stream:
    """A stream of one connection, from its opening on."""

    channel: grpc.aio.Channel
    name: bytes = field(default_factory=lambda: secrets.token_bytes(NAME_BYTES))
    is_known: bool = False
    """The node has said so: requests may name it."""
    is_retired: bool = False
    """New requests go another way; it ends with the last that it carries."""
    inboxes: dict[int, Inbox] = field(default_factory=dict)
    outgoing: Outgoing | None = None
    """Where it takes requests."""
    reading: asyncio.Task[None] | None = None

    def end(self) -> None:
        """Stops reading."""
        if self.reading is not None:
            self.reading.cancel()


class AnswerStreams:
    """One stream for each connection to a decode node. One event loop's."""

    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels
        self._streams: dict[str, _Stream] = {}
        self._reading: set[asyncio.Task[None]] = set()
        """Retired streams' too."""
        self._tags = count(1)

    @contextmanager
    def inbox(self, address: str) -> Iterator[Inbox]:
        """For the answer to one request to a node."""
        stream = self._stream(address)
        if stream is None or not stream.is_known:
            yield Inbox()
            return
        inbox = Inbox(stream.name, next(self._tags), stream.outgoing)
        stream.inboxes[inbox.tag] = inbox
        try:
            yield inbox
        finally:
            del stream.inboxes[inbox.tag]
            if stream.is_retired and not stream.inboxes:
                stream.end()

    async def close(self) -> None:
        """Ends all."""
        tasks = list(self._reading)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stream(self, address: str) -> _Stream | None:
        """That of the connection that calls go over now."""
        channel = self._channels.get(address, "decode")
        stream = self._streams.get(address)
        if stream is not None and stream.channel is not channel:  # another certificate, or the node was away
            stream.is_retired = True
            if not stream.inboxes:
                stream.end()
            stream = None
        if stream is None:
            stream = self._streams[address] = _Stream(channel)
            stream.reading = asyncio.get_running_loop().create_task(self._read(address, stream))
            self._reading.add(stream.reading)
            stream.reading.add_done_callback(self._reading.discard)
        return stream

    async def _read(self, address: str, stream: _Stream) -> None:
        """Hands out what comes, to the stream's end; then leaves the place for a new one after a pause."""
        why = "it was closed"
        try:
            if not await self._exchange(stream):
                await self._listen(stream)
        except grpc.aio.AioRpcError as error:
            why = error.code().name
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            why = str(error)
        finally:
            stream.is_known = False
            for inbox in stream.inboxes.values():
                inbox.end(AnswerBroken(f"the stream of answers has ended: {why}"))
            log.debug("stream of answers ended", address=address, why=why)
            loop = asyncio.get_running_loop()
            loop.call_later(PAUSE_S, self._forget, address, stream)

    async def _exchange(self, stream: _Stream) -> bool:
        """Asks and reads, to the stream's end; whether the node knows such streams."""
        outgoing = Outgoing(stream.name)
        try:
            async for message in decode_pb2_grpc.DecodeServiceStub(stream.channel).GenerateMany(outgoing.messages()):
                stream.is_known, stream.outgoing = True, outgoing
                _hand_out(message.steps, stream)
                for failure in message.failures:
                    inbox = stream.inboxes.get(failure.answer_tag)
                    if inbox is not None:
                        inbox.end(RequestFailed(failure))
        except grpc.aio.AioRpcError as error:
            if stream.is_known or error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            return False
        finally:
            outgoing.close()
        return True

    async def _listen(self, stream: _Stream) -> None:
        """Reads, to the stream's end, from a node that takes requests by calls only."""
        request = decode_pb2.StreamAnswersRequest(answer_stream=stream.name)
        async for message in decode_pb2_grpc.DecodeServiceStub(stream.channel).StreamAnswers(request):
            stream.is_known = True
            _hand_out(message.steps, stream)

    def _forget(self, address: str, stream: _Stream) -> None:
        if self._streams.get(address) is stream:
            del self._streams[address]


def _hand_out(steps: Iterable[decode_pb2.TaggedStep], stream: _Stream) -> None:
    for tagged in steps:
        inbox = stream.inboxes.get(tagged.answer_tag)
        if inbox is not None:  # else its reader has gone
            inbox.take(tagged.step)
