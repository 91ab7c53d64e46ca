"""A node's life: starts, serves, drains in order, ends in bounded time."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import urllib.request

import pytest
from grpc_reflection.v1alpha import reflection_pb2
from node_worlds import DIRECTORY_SERVICE, STORE_SERVICE, reflection_of, serving, with_store
from prometheus_client import CollectorRegistry

from spolia.version import __version__
from spolia_core.errors import InvalidRequest
from spolia_node import metrics_endpoint
from spolia_node.config import NodeConfig
from spolia_node.metrics_endpoint import MetricsEndpoint
from spolia_node.server import NodeServer


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
def test_the_endpoint_ends_at_once_also_beside_a_client_that_says_nothing(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "CLIENT_TIMEOUT_S", 60.0)
    monkeypatch.setattr(metrics_endpoint, "WAKE_TIMEOUT_S", 30.0)
    try:
        endpoint = MetricsEndpoint(CollectorRegistry(), host, 0)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    reached = {"0.0.0.0": "127.0.0.1"}.get(host, host)
    with socket.create_connection((reached, endpoint.port), 10):
        began = time.monotonic()
        endpoint.stop()
        endpoint.stop()
        assert time.monotonic() - began < 15.0, "it was woken, and waited for nobody"
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
