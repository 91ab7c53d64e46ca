"""Requests on their way to a decode node, on the stream that carries their answers.

    request ── ask ─────┐
    request ── ask ─────┼──▶ what is new since the last message ──▶ one message ──▶ decode node
    its end ── cancel ──┘

Unsent requests wait here while a message is written. One that nobody wants any more is not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from spolia.v1.decode_pb2 import DecodeServiceGenerateRequest, GenerateManyRequest, StreamedRequest
from spolia_node.deadline import Deadline
from spolia_node.tracing import PARENT_KEY, STATE_KEY, trace_metadata

MAX_REQUEST_BYTES = 64 << 10
"""A longer request goes on a call of its own: others would wait until it is through."""
MAX_TOGETHER = 256
"""Requests of a message, and as many cancels; a node takes 1024."""
MAX_WAITING_BYTES = 1 << 20
"""Where a node takes nothing, further requests go on calls of their own."""


@dataclass(frozen=True, slots=True)
class _Unsent:
    streamed: StreamedRequest
    num_bytes: int
    deadline: Deadline


class Outgoing:
    """What one stream has still to say. One event loop's."""

    def __init__(self, name: bytes) -> None:
        """`name` is the stream's."""
        self._name = name
        self._unsent: dict[int, _Unsent] = {}
        self._num_bytes = 0
        self._cancelled: list[int] = []
        self._wake: asyncio.Future[None] | None = None
        self._closed = False

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether a request of this size goes here."""
        return num_bytes <= MAX_REQUEST_BYTES and self._num_bytes + num_bytes <= MAX_WAITING_BYTES

    def ask(self, request: DecodeServiceGenerateRequest, num_bytes: int, deadline: Deadline) -> None:
        """Sends a request, named by its `answer_tag`, with the trace around this place."""
        trace = dict(trace_metadata())
        streamed = StreamedRequest(
            request=request, traceparent=trace.get(PARENT_KEY, ""), tracestate=trace.get(STATE_KEY, "")
        )
        self._unsent[request.answer_tag] = _Unsent(streamed, num_bytes, deadline)
        self._num_bytes += num_bytes
        self._look()

    def cancel(self, tag: int) -> None:
        """Says that nobody wants an answer any more; nothing to a node that has not heard of the request."""
        unsent = self._unsent.pop(tag, None)
        if unsent is None:
            self._cancelled.append(tag)
            self._look()
        else:
            self._num_bytes -= unsent.num_bytes

    def close(self) -> None:
        """Ends `messages`: gRPC leaves what it sends from to wait for ever when a call ends."""
        self._closed = True
        self._look()

    async def messages(self) -> AsyncGenerator[GenerateManyRequest, None]:
        """What to send, until this is closed: the stream's name first."""
        yield GenerateManyRequest(answer_stream=self._name)
        while not self._closed:
            if self._unsent or self._cancelled:
                yield self._next()
            else:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake

    def _next(self) -> GenerateManyRequest:
        message = GenerateManyRequest(cancelled_tags=self._cancelled[:MAX_TOGETHER])
        del self._cancelled[:MAX_TOGETHER]
        num_bytes = 0
        while self._unsent and len(message.requests) < MAX_TOGETHER:
            tag, unsent = next(iter(self._unsent.items()))
            num_bytes += unsent.num_bytes
            if message.requests and num_bytes > MAX_REQUEST_BYTES:
                break
            del self._unsent[tag]
            self._num_bytes -= unsent.num_bytes
            unsent.streamed.time_left_ms = max(1, int(unsent.deadline.remaining() * 1e3))
            message.requests.append(unsent.streamed)
        return message

    def _look(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
