"""A node on a free port with a scripted store behind it, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from spolia.v1 import directory_pb2, kvstore_pb2
from spolia.v1.directory_pb2_grpc import (
    DirectoryServiceServicer,
    DirectoryServiceStub,
    add_DirectoryServiceServicer_to_server,
)
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceServicer, KVStoreServiceStub, add_KVStoreServiceServicer_to_server
from spolia_node.config import NodeConfig
from spolia_node.server import NodeServer

STORE_SERVICE = "spolia.v1.KVStoreService"
DIRECTORY_SERVICE = "spolia.v1.DirectoryService"

Act = Callable[[Any], Awaitable[None]]
"""What a handler does with its context before it answers."""


async def answer_at_once(_context: Any) -> None:
    """Nothing in the way of an answer."""


class Gate:
    """A handler that waits until it is opened, and knows when it was entered and left."""

    def __init__(self) -> None:
        self.entered, self.opened, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, _context: Any) -> None:
        self.entered.set()
        try:
            await self.opened.wait()
        finally:
            self.left.set()


class ScriptedStore(KVStoreServiceServicer):
    """One RPC per shape; each does `act` in its middle. Claim is left to the generated base class."""

    def __init__(self, act: Act) -> None:
        self.act = act

    async def GetStats(self, request: Any, context: Any) -> kvstore_pb2.GetStatsResponse:
        await self.act(context)
        return kvstore_pb2.GetStatsResponse(num_objects=1)

    async def Get(self, request: Any, context: Any) -> AsyncIterator[kvstore_pb2.GetResponse]:
        yield kvstore_pb2.GetResponse(header=kvstore_pb2.GetHeader(index=0))
        await self.act(context)
        yield kvstore_pb2.GetResponse(header=kvstore_pb2.GetHeader(index=1))

    async def Put(self, request_iterator: Any, context: Any) -> kvstore_pb2.PutResponse:
        async for _ in request_iterator:
            await self.act(context)
        return kvstore_pb2.PutResponse(replica="r")


class ScriptedDirectory(DirectoryServiceServicer):
    """The bidirectional shape: does `act` at each heartbeat, then answers it."""

    def __init__(self, act: Act) -> None:
        self.act = act

    async def Register(self, request_iterator: Any, context: Any) -> AsyncIterator[directory_pb2.RegisterResponse]:
        async for _ in request_iterator:
            await self.act(context)
            yield directory_pb2.RegisterResponse(lease_ms=1)


@dataclass
class World:
    """A serving node and a channel to it."""

    server: NodeServer
    channel: grpc.aio.Channel

    @property
    def store(self) -> Any:
        return KVStoreServiceStub(self.channel)

    async def unary_unary(self, **call: Any) -> int:
        return (await self.store.GetStats(kvstore_pb2.GetStatsRequest(), **call)).num_objects

    async def unary_stream(self, **call: Any) -> list[int]:
        return [r.header.index async for r in self.store.Get(kvstore_pb2.GetRequest(), **call)]

    async def stream_unary(self, **call: Any) -> str:
        return (await self.store.Put(iter([kvstore_pb2.PutRequest()]), **call)).replica

    async def stream_stream(self, **call: Any) -> list[int]:
        calls: Any = DirectoryServiceStub(self.channel)
        return [r.lease_ms async for r in calls.Register(iter([directory_pb2.RegisterRequest()]), **call)]

    async def health_of(self, service: str = "") -> int:
        check = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return (await check(health_pb2.HealthCheckRequest(service=service), timeout=10)).status

    def watch_health(self, service: str = "") -> Any:
        watch = self.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return watch(health_pb2.HealthCheckRequest(service=service), timeout=30)


def reflection_of(world: World) -> Any:
    """Asks a node what it serves."""
    return world.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )


SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def with_store(server: NodeServer, act: Act = answer_at_once) -> NodeServer:
    """The node, with a scripted store and directory added."""
    store, directory = ScriptedStore(act), ScriptedDirectory(act)
    server.add(lambda grpc_server: add_KVStoreServiceServicer_to_server(store, grpc_server), STORE_SERVICE)
    server.add(lambda grpc_server: add_DirectoryServiceServicer_to_server(directory, grpc_server), DIRECTORY_SERVICE)
    return server


@asynccontextmanager
async def serving(act: Act = answer_at_once, config: NodeConfig | None = None) -> AsyncIterator[World]:
    """A started node; stopped at once at the end."""
    server = with_store(NodeServer(config or NodeConfig(), "kvstore"), act)
    await server.start()
    try:
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            yield World(server, channel)
    finally:
        await server.stop_at_once()
