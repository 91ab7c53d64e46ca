"""Prefill nodes that misbehave: a real one behind a front that spoils what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from tiny_cluster import World

from spolia.v1.common_pb2 import Frame
from spolia.v1.directory_pb2 import NODE_ROLE_PREFILL, NodeRecord
from spolia.v1.prefill_pb2 import PrefillRequest, PrefillResponse
from spolia.v1.prefill_pb2_grpc import PrefillServiceServicer, PrefillServiceStub, add_PrefillServiceServicer_to_server
from spolia_core.digests import digest
from spolia_core.errors import Unavailable
from spolia_node.deadline import Deadline
from spolia_node.interceptor import ErrorInterceptor
from spolia_node.membership import Registration
from spolia_prefill.node import PrefillNode

Spoil = Callable[[AsyncIterator[PrefillResponse]], AsyncIterator[PrefillResponse]]
NODE_ID = "a-front"


async def dies_after_two_layers(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("layer_frame") and response.layer_frame.layer == 2:
            raise Unavailable("killed")
        yield response


async def spoils_a_frame(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("layer_frame") and response.layer_frame.layer == 1:
            response.layer_frame.frame.data = response.layer_frame.frame.data[:-1] + b"\x55"
        if response.HasField("inline_frame"):
            response.inline_frame.data = response.inline_frame.data[:-1] + b"\x55"
        yield response


async def announces_another_shape(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("live_header"):
            response.live_header.num_tokens += 1
        yield response


async def announces_nothing(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if not response.HasField("live_header"):
            yield response


async def swaps_layers(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("layer_frame"):
            response.layer_frame.layer = (response.layer_frame.layer + 1) % 3
        yield response


async def swaps_slices(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("layer_frame"):
            response.layer_frame.slice = (response.layer_frame.slice + 1) % 4
        yield response


async def leaves_a_slice_out(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if not response.HasField("layer_frame") or response.layer_frame.slice != 2:
            yield response


async def announces_more_than_its_slices(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("live_header"):
            response.live_header.slice_tokens.append(1)
        yield response


async def announces_an_empty_slice(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("live_header"):
            response.live_header.slice_tokens.append(0)
        yield response


async def announces_twice(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("live_header"):
            yield response
        yield response


async def dies_after_a_slice(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("layer_frame") and response.layer_frame.slice == 1:
            raise Unavailable("killed")
        yield response


async def sends_a_short_hidden_state(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("last_hidden"):
            short = response.last_hidden.data[:-4]
            response.last_hidden.CopyFrom(Frame(data=short, digest=digest(short)))
        yield response


async def breaks_the_hidden_state(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("last_hidden"):
            response.last_hidden.data = bytes(len(response.last_hidden.data))
        yield response


async def ends_early(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for response in responses:
        if response.HasField("last_hidden") or response.HasField("done"):
            return
        yield response


async def never_answers(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    async for _ in responses:
        await asyncio.Event().wait()
        yield PrefillResponse()


async def raises_what_it_should_not(responses: AsyncIterator[PrefillResponse]) -> AsyncIterator[PrefillResponse]:
    raise ValueError("a bug")
    yield PrefillResponse()


SPOILERS: dict[str, Spoil] = {
    spoil.__name__: spoil
    for spoil in (
        dies_after_two_layers,
        spoils_a_frame,
        announces_another_shape,
        announces_nothing,
        swaps_layers,
        swaps_slices,
        leaves_a_slice_out,
        announces_more_than_its_slices,
        announces_an_empty_slice,
        announces_twice,
        dies_after_a_slice,
        sends_a_short_hidden_state,
        breaks_the_hidden_state,
        ends_early,
        raises_what_it_should_not,
    )
}


class Front(PrefillServiceServicer):
    """Passes a stream on to a real node and spoils the answers."""

    def __init__(self, behind: PrefillNode, spoil: Spoil) -> None:
        self._behind = behind
        self._spoil = spoil
        self.num_calls = 0

    async def Prefill(
        self, request_iterator: AsyncIterator[PrefillRequest], context: Any
    ) -> AsyncIterator[PrefillResponse]:
        self.num_calls += 1
        async with grpc.aio.insecure_channel(self._behind.server.address) as channel:
            call = PrefillServiceStub(channel).Prefill(request_iterator, timeout=context.time_remaining())
            try:
                async for response in self._spoil(call):
                    yield response
            finally:
                call.cancel()


async def a_front(world: World, behind: PrefillNode, spoil: Spoil) -> tuple[Front, str]:
    """A front in the world's directory, under a node id that comes first; and its address."""
    front = Front(behind, spoil)
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    add_PrefillServiceServicer_to_server(front, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    world.stack.push_async_callback(server.stop, None)
    model = behind.record().model
    registration = Registration(
        behind.channels,
        world.directory,
        lambda: NodeRecord(node_id=NODE_ID, role=NODE_ROLE_PREFILL, address=address, model=model),
    )
    registration.start()
    world.stack.push_async_callback(registration.stop)
    await registration.wait_registered(Deadline.after(10))
    return front, address
