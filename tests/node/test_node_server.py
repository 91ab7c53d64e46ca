"""A node's life: starts, serves, drains in order, ends in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import urllib.request
from functools import partial
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection_pb2
from node_worlds import DIRECTORY_SERVICE, STORE_SERVICE, World, serving, with_store
from prometheus_client import CollectorRegistry

from spolia.errors import error_from_rpc
from spolia.version import __version__
from spolia_core.errors import InvalidRequest, Unavailable
from spolia_node.calls import call_errors
from spolia_node.channels import ChannelPool
from spolia_node.config import NodeConfig
from spolia_node.deadline import Deadline
from spolia_node.metrics_endpoint import MetricsEndpoint
from spolia_node.server import NodeServer


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


async def _tell(event: asyncio.Event) -> None:
    event.set()


class Journal:
    """A registration that writes down what it is asked, and what the node looked like then."""

    def __init__(self, world: World, events: list[str]) -> None:
        self.world, self.events = world, events

    async def touch(self) -> None:
        self.events.append(f"touch accepting={self.world.server.accepting} health={await self.world.health_of()}")

    async def stop(self) -> None:
        self.events.append("leave")


async def first_failure(world: World) -> Exception:
    """Calls until a call fails."""
    try:
        while True:
            await world.health_of()
    except grpc.aio.AioRpcError as refused:
        return error_from_rpc(refused)


async def test_a_drain_goes_in_order():
    gate, hooked, events = Gate(), asyncio.Event(), []
    async with serving(gate) as world:
        world.server.registration = Journal(world, events)

        async def hook() -> None:
            events.append("hook")
            hooked.set()

        world.server.on_drain.append(hook)
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        assert world.server.accepting
        drain = asyncio.ensure_future(world.server.drain())
        await hooked.wait()
        assert events == [f"touch accepting=True health={HealthCheckResponse.NOT_SERVING}", "hook"]
        gate.opened.set()
        assert await stream == [0, 1]
        assert await drain is True
        assert events[2:] == ["leave"]


async def test_work_is_taken_until_the_others_have_heard_of_the_drain():
    async with serving(config=NodeConfig(drain_delay_s=0.3)) as world:
        world.server.registration = Journal(world, [])
        assert not world.server.leaving
        drain = asyncio.ensure_future(world.server.drain())
        began = time.monotonic()
        while world.server.accepting:
            assert await world.unary_unary(timeout=30) == 1
        assert 0.25 < time.monotonic() - began < 5
        assert world.server.leaving
        with pytest.raises(Unavailable, match="draining"):
            world.server.check_accepting()
        assert await asyncio.wait_for(drain, 30) is True


async def test_the_delay_leaves_half_of_the_limit_to_calls_and_is_none_without_a_directory():
    for registers, least_s in ((True, 0.2), (False, 0.0)):
        async with serving(config=NodeConfig(drain_delay_s=60.0, drain_timeout_s=0.4)) as world:
            if registers:
                world.server.registration = Journal(world, [])
            began = time.monotonic()
            hooked = asyncio.Event()
            world.server.on_drain.append(partial(_tell, hooked))
            drain = asyncio.ensure_future(world.server.drain())
            await asyncio.wait_for(hooked.wait(), 30)
            assert least_s <= time.monotonic() - began < least_s + 0.19
            assert await asyncio.wait_for(drain, 30) is True


async def test_what_ends_beside_the_server_does_not_keep_it_from_sending_callers_elsewhere():
    async with serving(config=NodeConfig(drain_timeout_s=30.0)) as world:
        refused = asyncio.Event()
        given: list[Deadline] = []

        async def other_server(deadline: Deadline) -> None:
            given.append(deadline)
            await refused.wait()

        world.server.on_stop.append(other_server)
        drain = asyncio.ensure_future(world.server.drain())
        assert type(await first_failure(world)) is Unavailable
        assert not drain.done()
        refused.set()
        assert await asyncio.wait_for(drain, 30) is True
        assert 0 < given[0].remaining() <= 30.0


async def test_a_stop_at_once_cuts_short_what_ends_beside_the_server():
    gate = Gate()
    async with serving(gate, NodeConfig(drain_timeout_s=3600.0)) as world:
        world.server.on_stop.append(lambda _: asyncio.Event().wait())
        stream = asyncio.ensure_future(world.unary_stream(timeout=60))
        await gate.entered.wait()
        drain = asyncio.ensure_future(world.server.drain())
        await first_failure(world)
        await asyncio.wait_for(world.server.stop_at_once(), 30)
        assert gate.left.is_set()
        await asyncio.gather(stream, drain, return_exceptions=True)


async def test_a_drain_lets_a_running_stream_finish_and_takes_no_new_one():
    gate = Gate()
    async with serving(gate) as world:
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        drain = asyncio.ensure_future(world.server.drain())
        assert type(await first_failure(world)) is Unavailable
        with pytest.raises(Unavailable, match="draining"):
            world.server.check_accepting()
        assert not drain.done()
        gate.opened.set()
        assert await stream == [0, 1]
        assert await asyncio.wait_for(drain, 30) is True


async def test_a_drain_ends_what_is_still_running_at_its_limit():
    gate = Gate()
    async with serving(gate, NodeConfig(drain_timeout_s=0.3)) as world:
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        assert await asyncio.wait_for(world.server.drain(), 30) is True
        assert gate.left.is_set()
        assert world.server.num_running == 0
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stream
    met = error_from_rpc(failed.value)
    assert type(met) is Unavailable
    assert "shutting down" in met.message


async def test_hooks_run_at_the_same_time_and_a_late_or_broken_one_is_not_clean():
    first, second = asyncio.Event(), asyncio.Event()

    async def one() -> None:
        first.set()
        await second.wait()

    async def other() -> None:
        second.set()
        await first.wait()

    async def broken() -> None:
        raise RuntimeError("the disk is full")

    async def late() -> None:
        await asyncio.Event().wait()

    def broken_at_once() -> Any:
        raise RuntimeError("no such hook")

    async def stubborn() -> None:
        while not first.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await first.wait()

    for hooks, clean in (
        ([one, other], True),
        ([one, other, broken], False),
        ([broken_at_once], False),
        ([late], False),
        ([stubborn], False),
    ):
        first.clear()
        second.clear()
        async with serving(config=NodeConfig(drain_timeout_s=0.3)) as world:
            world.server.on_drain.extend(hooks)
            assert await asyncio.wait_for(world.server.drain(), 30) is clean
            first.set()


async def test_a_directory_that_is_away_does_not_hold_up_the_drain():
    class Away:
        async def touch(self) -> None:
            raise Unavailable("no directory")

        async def stop(self) -> None:
            await asyncio.Event().wait()

    async with serving() as world:
        world.server.registration = Away()
        assert await asyncio.wait_for(world.server.drain(), 30) is True


async def test_drains_join_and_a_stop_cuts_them_short():
    gate = Gate()
    async with serving(gate, NodeConfig(drain_timeout_s=3600.0)) as world:
        stream = asyncio.ensure_future(world.unary_stream(timeout=30))
        await gate.entered.wait()
        drains = [asyncio.ensure_future(world.server.drain()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.wait_for(world.server.stop_at_once(), 30)
        assert gate.left.is_set()
        for ended in (stream, *drains):
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await ended


def reflection_of(world: World) -> Any:
    return world.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )


async def test_streams_without_end_do_not_hold_up_a_drain():
    async with serving(config=NodeConfig(drain_timeout_s=3600.0)) as world:
        call = reflection_of(world)(timeout=60)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await call.read()).list_services_response.service
        assert await asyncio.wait_for(world.server.drain(), 30) is True
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
    assert type(error_from_rpc(failed.value)) is Unavailable


async def test_reflection_lists_what_is_served():
    async with serving() as world:
        asked = reflection_pb2.ServerReflectionRequest
        call = reflection_of(world)(
            iter([asked(list_services=""), asked(file_containing_symbol=STORE_SERVICE)]), timeout=30
        )
        listed, described = [answer async for answer in call]
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {STORE_SERVICE, DIRECTORY_SERVICE, "grpc.health.v1.Health"}
    assert described.file_descriptor_response.file_descriptor_proto


async def test_a_taken_port_stops_the_start_by_name():
    async with serving() as world:
        port = int(world.server.address.rpartition(":")[2])
        second = with_store(NodeServer(NodeConfig(port=port), "kvstore"))
        try:
            with pytest.raises(InvalidRequest, match=f"port {port} cannot be bound") as refused:
                await second.start()
        finally:
            await second.stop_at_once()
        assert refused.value.field == "port"


async def test_a_taken_metrics_port_stops_the_start_by_name():
    async with serving() as world:
        port = int(world.server.metrics_address.rpartition(":")[2])
        second = with_store(NodeServer(NodeConfig(metrics_port=port), "kvstore"))
        with pytest.raises(InvalidRequest, match=f"metrics_port {port} cannot be bound"):
            await second.start()


async def test_metrics_can_be_turned_off():
    server = with_store(NodeServer(NodeConfig(metrics_port=-1), "kvstore"))
    await server.start()
    assert server.metrics_address == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "metrics"]
    await server.stop_at_once()


async def test_the_address_is_what_peers_are_told():
    server = with_store(NodeServer(NodeConfig(advertise_host="node-1"), "kvstore"))
    port = await server.start()
    assert server.address == f"node-1:{port}"
    await server.stop_at_once()


async def test_metrics_are_served_over_http_until_the_end():
    async with serving() as world:
        await world.unary_unary(timeout=30)

        def page() -> str:
            with urllib.request.urlopen(f"http://{world.server.metrics_address}/metrics", timeout=30) as answer:
                return answer.read().decode()

        lines = (await asyncio.to_thread(page)).splitlines()
        counted = 'spolia_rpc_requests_total{code="%s",method="%s",service="spolia.v1.KVStoreService"} %s'
        assert counted % ("OK", "GetStats", "1.0") in lines
        assert counted % ("UNAVAILABLE", "Claim", "0.0") in lines, "what nobody called is there, too"
        assert (
            f'spolia_node_info{{node_id="{world.server.node_id}",role="kvstore",version="{__version__}"}} 1.0' in lines
        )
        await world.server.drain()
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(page)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_the_endpoint_ends_at_once_also_beside_a_client_that_says_nothing(host: str) -> None:
    try:
        endpoint = MetricsEndpoint(CollectorRegistry(), host, 0)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    reached = {"0.0.0.0": "127.0.0.1"}.get(host, host)
    with socket.create_connection((reached, endpoint.port), 10):
        began = time.monotonic()
        endpoint.stop()
        endpoint.stop()
        assert time.monotonic() - began < 0.5
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((reached, endpoint.port), 10)


def test_two_endpoints_share_no_port() -> None:
    first = MetricsEndpoint(CollectorRegistry(), "127.0.0.1", 0)
    try:
        with pytest.raises(OSError, match="in use"):
            MetricsEndpoint(CollectorRegistry(), "127.0.0.1", first.port)
    finally:
        first.stop()


async def test_a_metric_asked_for_twice_is_one_metric():
    metrics = NodeServer(NodeConfig(), "kvstore").metrics
    metrics.counter("spolia_hits_total", "Hits.", "tier").labels("ram").inc(2)
    metrics.counter("spolia_hits_total", "Hits.", "tier").labels("ram").inc()
    assert metrics.value("spolia_hits_total", tier="ram") == 3
    assert metrics.value("spolia_hits_total", tier="disk") == 0
    other = NodeServer(NodeConfig(), "kvstore").metrics
    assert other.value("spolia_hits_total", tier="ram") == 0


async def test_the_pool_keeps_one_channel_per_address_until_it_is_dropped():
    async with serving() as world:
        pool = ChannelPool(16 << 20)
        first = pool.get(world.server.address, "kvstore")
        assert pool.get(world.server.address, "kvstore") is first
        assert await World(world.server, first).unary_unary(timeout=30) == 1
        pool.drop(world.server.address)
        second = pool.get(world.server.address, "kvstore")
        assert second is not first
        assert await World(world.server, second).unary_unary(timeout=30) == 1
        await pool.close()
        await pool.close()
        with pytest.raises(Unavailable):
            pool.get(world.server.address, "kvstore")


@pytest.mark.parametrize("end", ["drop", "close"])
async def test_dropping_or_closing_ends_running_calls_which_is_not_a_cancel_of_their_callers(end: str):
    gate = Gate()
    async with serving(gate) as world:
        pool, address = ChannelPool(16 << 20), world.server.address

        async def call() -> list[int]:
            with call_errors(address):
                return await World(world.server, pool.get(address, "kvstore")).unary_stream(timeout=30)

        running = asyncio.ensure_future(call())
        await gate.entered.wait()
        if end == "drop":
            pool.drop(address)
        else:
            await pool.close()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(running, 20)
        await asyncio.wait_for(gate.left.wait(), 20)
        await pool.close()


async def test_a_node_that_comes_back_is_called_at_once_and_one_that_is_connected_is_left_alone():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    pool, address = ChannelPool(16 << 20), f"127.0.0.1:{port}"

    async def call(world: World) -> int:
        with call_errors(address):
            return await World(world.server, pool.get(address, "kvstore")).unary_unary(timeout=30)

    async with serving() as somewhere_else:
        with pytest.raises(Unavailable):  # nobody is there: the channel waits before it tries again
            await call(somewhere_else)
    async with serving(config=NodeConfig(port=port)) as world:
        with pytest.raises(Unavailable):
            await call(world)
        pool.look_again(address)
        assert await call(world) == 1
        connected = pool.get(address, "kvstore")
        pool.look_again(address)
        assert pool.get(address, "kvstore") is connected
        await pool.close()
