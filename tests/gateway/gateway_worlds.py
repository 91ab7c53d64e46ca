"""A gateway among fakes, and requests for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from gateway_fakes import (
    MODEL,
    WAIT_S,
    FakeDecode,
    FakeDirectory,
    FakePrefill,
    FakeStore,
    record,
)
from hypothesis import settings

from spolia.v1 import (
    common_pb2,
    decode_pb2_grpc,
    directory_pb2,
    directory_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    kvstore_pb2_grpc,
    prefill_pb2_grpc,
)
from spolia_gateway.config import OFF, GatewayConfig
from spolia_gateway.node import GatewayNode
from spolia_node.deadline import Deadline
from spolia_node.interceptor import ErrorInterceptor
from spolia_node.membership import ClusterView

LAWFUL = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@dataclass
class World:
    """A gateway among fakes. `stub` is a client's."""

    directory: FakeDirectory
    store: FakeStore
    node: GatewayNode
    stub: Any
    channel: grpc.aio.Channel
    directory_server: grpc.aio.Server
    decodes: dict[str, FakeDecode] = field(default_factory=dict)
    prefills: dict[str, FakePrefill] = field(default_factory=dict)

    async def sees(self, predicate: Callable[[ClusterView], bool]) -> None:
        """Returns once the gateway's view of the cluster is such."""
        await self.node.cluster.wait_for(predicate, Deadline.after(WAIT_S))

    async def idle(self) -> None:
        """Returns once no call is under way at the gateway."""
        await asyncio.wait_for(self.node.server._interceptor.wait_idle(), WAIT_S)

    async def generate(
        self,
        request: gateway_pb2.GenerateRequest,
        timeout: float = WAIT_S,
        at_first_token: Callable[[], object] | None = None,
    ) -> Streamed:
        """The whole stream, checked delta by delta as a strict client would."""
        streamed = Streamed()
        async for response in self.stub.Generate(request, timeout=timeout):
            streamed.take(response)
            if at_first_token is not None and streamed.token_ids:
                at_first_token()
                at_first_token = None
        return streamed


@dataclass
class Streamed:
    """What a client has at the end of a stream."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: common_pb2.Finish | None = None

    def take(self, response: gateway_pb2.GenerateResponse) -> None:
        assert self.finish is None
        if response.HasField("finish"):
            self.finish = response.finish
            return
        if response.delta.token_ids:
            assert response.delta.token_index == len(self.token_ids)
        if response.delta.text:
            assert response.delta.text_offset == len(self.text)
        self.token_ids.extend(response.delta.token_ids)
        self.text += response.delta.text


async def serve(stack: AsyncExitStack, *registrars: Callable[[grpc.aio.Server], None]) -> tuple[grpc.aio.Server, str]:
    """A server of fakes on a free port, stopped when the stack closes."""
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    for register in registrars:
        register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(lambda: server.stop(None))
    return server, f"127.0.0.1:{port}"


@asynccontextmanager
async def world(
    model: Path,
    *,
    decodes: Sequence[FakeDecode] = (),
    num_prefills: int = 0,
    served: directory_pb2.ServedModel | None = None,
    **changes: Any,
) -> AsyncIterator[World]:
    """Starts fakes and a gateway, waits until it knows them all, stops everything, and sees that no task is left.

    Each decode node is busier than the one before it, so a short prompt is tried on them in the order given.
    """
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        directory = FakeDirectory()
        store = FakeStore()  # type: ignore[abstract]  # what it lacks answers UNIMPLEMENTED, and no gateway calls it
        directory_server, directory_address = await serve(
            stack,
            partial(directory_pb2_grpc.add_DirectoryServiceServicer_to_server, directory),
            partial(kvstore_pb2_grpc.add_KVStoreServiceServicer_to_server, store),
        )
        prefills = [FakePrefill(f"prefill-{i}", store) for i in range(num_prefills)]
        for fake in decodes:
            fake.server, fake.address = await serve(
                stack, partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, fake)
            )
            directory.put(
                record(fake.node_id, address=fake.address, model=served, num_running=10 * len(directory.nodes))
            )
        for other in prefills:
            other.server, other.address = await serve(
                stack, partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, other)
            )
            directory.put(record(other.node_id, directory_pb2.NODE_ROLE_PREFILL, other.address, model=served))
        fixed: dict[str, Any] = {
            "port": 0,
            "directory": directory_address,
            "model": model,
            "model_name": MODEL,
            "http_port": OFF,
        }
        config = GatewayConfig(**(fixed | {"drain_timeout_s": 0.2, "drain_delay_s": 0.0} | changes))
        node = GatewayNode(config)
        stack.push_async_callback(node.close)
        stack.push_async_callback(node.server.stop_at_once)
        address = await node.start()
        channel = grpc.aio.insecure_channel(address)
        stack.push_async_callback(lambda: channel.close(None))
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        made = World(
            directory,
            store,
            node,
            stub,
            channel,
            directory_server,
            {fake.node_id: fake for fake in decodes},
            {fake.node_id: fake for fake in prefills},
        )
        await made.sees(
            lambda view: (
                len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == len(decodes)
                and len(view.nodes(directory_pb2.NODE_ROLE_PREFILL)) == num_prefills
                and view.reachable
            )
        )
        yield made
    left = asyncio.all_tasks() - before - {asyncio.current_task()}  # of a fixture, that which ends it
    if left:  # cancelled calls of the fakes take a moment to unwind
        _, left = await asyncio.wait(left, timeout=WAIT_S)
    assert not left, f"tasks left behind: {left}"


def text_request(*texts: str, **changes: Any) -> gateway_pb2.GenerateRequest:
    """A request whose parts are live texts."""
    return gateway_pb2.GenerateRequest(parts=[gateway_pb2.PromptPart(text=text) for text in texts], **changes)


def parts_request(*parts: gateway_pb2.PromptPart, **changes: Any) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(parts=parts, **changes)


def document_part(text: str, name: str = "") -> gateway_pb2.PromptPart:
    return gateway_pb2.PromptPart(document=gateway_pb2.Document(text=text, name=name))


def ids_part(*ids: int) -> gateway_pb2.PromptPart:
    return gateway_pb2.PromptPart(token_ids=gateway_pb2.TokenIds(ids=ids))
