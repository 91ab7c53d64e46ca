"""What a handler holds is freed when its call ends, however that is; calls are counted, and their ids logged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import structlog
from call_failures import failure
from node_worlds import SHAPES, STORE_SERVICE, ScriptedStore, World, answer_at_once, serving

from spolia.errors import error_from_rpc
from spolia.v1.common_pb2 import Frame
from spolia.v1.kvstore_pb2 import GetRequest, GetResponse, PutRequest
from spolia.v1.kvstore_pb2_grpc import KVStoreServiceServicer, KVStoreServiceStub, add_KVStoreServiceServicer_to_server
from spolia_core.errors import (
    NotFound,
    Unavailable,
)
from spolia_node.config import NodeConfig
from spolia_node.server import NodeServer


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_cancel_inside_the_handler_still_gives_the_caller_an_answer(shape: str):
    async def await_something_cancelled(_context: Any) -> None:
        inner = asyncio.ensure_future(asyncio.Event().wait())
        inner.cancel()
        await inner

    async with serving(await_something_cancelled) as world:
        assert type(error_from_rpc(await failure(world, shape))) is Unavailable


async def test_an_abort_by_hand_passes_unchanged():
    async def abort(context: Any) -> None:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "by hand")

    async with serving(abort) as world:
        failed = await failure(world, "unary_stream")
        assert (failed.code(), failed.details()) == (grpc.StatusCode.OUT_OF_RANGE, "by hand")
        counted = world.server.metrics.value(
            "spolia_rpc_requests_total", service="spolia.v1.KVStoreService", method="Get", code="OUT_OF_RANGE"
        )
        assert counted == 1


async def test_dropping_a_stream_runs_the_handlers_cleanup_before_its_call_ends():
    entered, freed, events = asyncio.Event(), asyncio.Event(), []

    async def hold(_context: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            events.append("freed")
            freed.set()

    async with serving(hold) as world:
        call = world.store.Get(GetRequest(), timeout=30)
        await entered.wait()
        call.cancel()
        await asyncio.wait_for(freed.wait(), 30)
        await asyncio.wait_for(world.server._interceptor.wait_idle(), 30)
        assert world.server.num_running == 0
        assert events == ["freed"]


async def test_a_generator_waiting_to_send_is_closed_before_its_call_ends():
    """The caller stops reading, so the handler hangs in a write and not in a wait of its own."""
    closed_while_running = asyncio.get_running_loop().create_future()

    class Firehose(ScriptedStore):
        async def Get(self, request: Any, context: Any) -> AsyncIterator[GetResponse]:
            try:
                while True:
                    yield GetResponse(frame=Frame(data=bytes(1 << 20)))
            finally:
                closed_while_running.set_result(server.num_running)

    server = NodeServer(NodeConfig(), "kvstore")
    server.add(lambda s: add_KVStoreServiceServicer_to_server(Firehose(answer_at_once), s), STORE_SERVICE)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = World(server, channel).store.Get(GetRequest(), timeout=30)
        await call.read()
        call.cancel()
        assert await asyncio.wait_for(closed_while_running, 30) == 1
    await server.stop_at_once()


async def test_the_request_id_of_the_metadata_is_bound_to_logs_and_to_one_call_only():
    seen = []

    async def look(_context: Any) -> None:
        seen.append(structlog.contextvars.get_contextvars())

    async with serving(look) as world:
        await world.unary_unary(timeout=30, metadata=(("x-request-id", "r-1"),))
        await world.unary_stream(timeout=30, metadata=(("x-request-id", "r" * 4000),))
        await world.unary_unary(timeout=30)
    assert seen == [{"request_id": "r-1"}, {"request_id": "r" * 128}, {}]


async def test_calls_are_counted_by_service_method_and_code():
    answers = [NotFound("no"), None, None]

    async def act(_context: Any) -> None:
        error = answers.pop(0)
        if error is not None:
            raise error

    async with serving(act) as world:
        await failure(world, "unary_unary")
        await world.unary_unary(timeout=30)
        await world.unary_unary(timeout=30)
        name, labels = "spolia_rpc_requests_total", {"service": "spolia.v1.KVStoreService", "method": "GetStats"}
        value = world.server.metrics.value
        assert (value(name, **labels, code="OK"), value(name, **labels, code="NOT_FOUND")) == (2, 1)
        assert value("spolia_rpc_seconds_count", **labels) == 3


async def test_a_put_of_many_messages_reads_them_all():
    read = []

    async def act(_context: Any) -> None:
        read.append(1)

    async with serving(act) as world:
        await world.store.Put(iter([PutRequest()] * 5), timeout=30)
    assert len(read) == 5


class FloodingStore(KVStoreServiceServicer):
    """Answers Get with more than any transport holds, until it is stopped."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Get(self, request: Any, context: Any) -> AsyncIterator[GetResponse]:
        try:
            while True:
                yield GetResponse(frame=Frame(data=bytes(1 << 20)))
        finally:
            self.ended.set()


@pytest.mark.parametrize("leaves", [False, True], ids=["stalls", "leaves"])
async def test_a_reader_that_stalls_or_leaves_ends_the_stream_and_counts_as_cancelled(
    leaves: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("spolia_node.interceptor.STALLED_READER_S", 0.5 if not leaves else 60.0)
    store = FloodingStore()
    server = NodeServer(NodeConfig(), "kvstore")
    server.add(lambda grpc_server: add_KVStoreServiceServicer_to_server(store, grpc_server), STORE_SERVICE)
    counted: asyncio.Queue[grpc.StatusCode] = asyncio.Queue()
    observe = server.metrics.observe_rpc
    server._interceptor._observe = lambda method, code, s: (observe(method, code, s), counted.put_nowait(code))
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = KVStoreServiceStub(channel).Get(GetRequest())
        await call.read()
        if leaves:
            call.cancel()
        await asyncio.wait_for(store.ended.wait(), 20)
        assert await asyncio.wait_for(counted.get(), 20) is grpc.StatusCode.CANCELLED
    await server.stop_at_once()
