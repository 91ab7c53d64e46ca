"""Answers as decode nodes send them: many on one stream of a connection, a message for all that is new.

    decode ── steps of many answers, tagged ──▶ AnswerStreams ──▶ inbox of a request ──▶ who reads its answer
           ── the request's own call: its end, and errors ──────────▲

A stream is opened when a connection is first used; until the node has said that it knows it, and where a node does not,
answers come on their requests' own calls.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import grpc

from spolia.v1 import decode_pb2, decode_pb2_grpc
from spolia_core.errors import Unavailable
from spolia_gateway.backlog import Backlog, Pace
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

    def __init__(self, stream: bytes = b"", tag: int = 0) -> None:
        """`stream` and `tag` are for the request to name; without them all comes on its call."""
        self.stream = stream
        self.tag = tag
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
                async with asyncio.timeout(LATE_S if has_ended else None):
                    item = await self._take()
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

    async def _take(self) -> Step | Exception | None:
        while not self._items:
            if self._backlog is not None:
                self._items, self._backlog = self._backlog.items, None
                continue
            self._wake = asyncio.get_running_loop().create_future()
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
        inbox = Inbox(stream.name, next(self._tags))
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
            call = decode_pb2_grpc.DecodeServiceStub(stream.channel).StreamAnswers(
                decode_pb2.StreamAnswersRequest(answer_stream=stream.name)
            )
            async for message in call:
                stream.is_known = True
                for tagged in message.steps:
                    inbox = stream.inboxes.get(tagged.answer_tag)
                    if inbox is not None:  # else its reader has gone
                        inbox.put(tagged.step)
        except grpc.aio.AioRpcError as error:
            why = error.code().name
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            why = str(error)
        finally:
            stream.is_known = False
            for inbox in stream.inboxes.values():
                inbox.put(AnswerBroken(f"the stream of answers has ended: {why}"))
            log.debug("stream of answers ended", address=address, why=why)
            loop = asyncio.get_running_loop()
            loop.call_later(PAUSE_S, self._forget, address, stream)

    def _forget(self, address: str, stream: _Stream) -> None:
        if self._streams.get(address) is stream:
            del self._streams[address]
