"""A decode node asked for an answer, which comes in an inbox: on the stream that carries answers, or by a call.

A request that goes on the stream costs no call. What gRPC would see to for a call is seen to here: its deadline, and
that the node hears when nobody waits any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import grpc

from spolia.v1.decode_pb2 import DecodeServiceGenerateRequest
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia_core.errors import DeadlineExceeded
from spolia_gateway.answer_streams import Inbox
from spolia_gateway.metrics import Asked
from spolia_gateway.outgoing import Outgoing
from spolia_node.deadline import Deadline
from spolia_node.interceptor import REQUEST_ID_KEY
from spolia_node.tracing import trace_metadata


@asynccontextmanager
async def asked(
    channel: grpc.aio.Channel, inbox: Inbox, request: DecodeServiceGenerateRequest, deadline: Deadline
) -> AsyncIterator[Asked]:
    """While the block runs a node works on `request`, and what it says comes in `inbox`."""
    num_bytes = request.ByteSize()
    if inbox.outgoing is not None and inbox.outgoing.has_room_for(num_bytes):
        with _on_the_stream(inbox, inbox.outgoing, request, num_bytes, deadline):
            yield Asked.STREAM
        return
    trace = (REQUEST_ID_KEY, request.request_id), *trace_metadata()
    call = DecodeServiceStub(channel).Generate(request, timeout=deadline.remaining(), metadata=trace)
    inbox.on_ended = call.cancel
    following = asyncio.ensure_future(inbox.follow(call))
    try:
        yield Asked.CALL
    finally:
        call.cancel()  # a no-op once the call has ended
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@contextmanager
def _on_the_stream(
    inbox: Inbox, outgoing: Outgoing, request: DecodeServiceGenerateRequest, num_bytes: int, deadline: Deadline
) -> Iterator[None]:
    late = DeadlineExceeded(f"request {request.request_id} ran out of time on its decode node")
    alarm = asyncio.get_running_loop().call_later(deadline.remaining(), inbox.put, late)
    inbox.comes_whole = True
    inbox.on_ended = partial(outgoing.cancel, inbox.tag)
    outgoing.ask(request, num_bytes, deadline)
    try:
        yield
    finally:
        alarm.cancel()
        if not inbox.has_ended:
            outgoing.cancel(inbox.tag)
