"""What a gateway says of itself and of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import FINGERPRINT, MODEL, WAIT_S, FakeDecode, answers, hangs, record, served_model
from gateway_tokenizers import byte_level_tokenizer
from gateway_worlds import World, text_request, world
from grpc_health.v1 import health_pb2

from spolia.errors import error_from_rpc
from spolia.v1 import common_pb2, directory_pb2, gateway_pb2
from spolia_core.errors import InvalidRequest, NotFound, Unavailable
from spolia_gateway.config import GatewayConfig
from spolia_gateway.node import GatewayNode

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(w: World, service: str = "") -> int:
    check = w.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    response = await check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
    return int(response.status)


async def test_a_gateway_serves_while_it_knows_a_decode_node_of_its_model(model: Path) -> None:
    async with world(model) as w:
        assert await health_of(w) == NOT_SERVING
        w.directory.put(record("other", model=served_model(name="other")))
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == 1)
        assert await health_of(w) == NOT_SERVING
        w.directory.put(record("a"))
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == 2)
        assert await health_of(w) == await health_of(w, "spolia.v1.GatewayService") == SERVING
        w.directory.remove("a")
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == 1)
        assert await health_of(w) == NOT_SERVING


async def test_models_are_listed_with_their_modes(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")]) as w:
        w.directory.put(record("b", model=served_model(name="zebra", supports_linked=False)))
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == 2)
        listed = (await w.stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=WAIT_S)).models
        assert [info.name for info in listed] == [MODEL, "zebra"]
        assert (listed[0].fingerprint, listed[0].max_context_tokens, listed[0].vocab_size) == (FINGERPRINT, 256, 320)
        assert list(listed[0].modes) == [common_pb2.REUSE_MODE_EXACT, common_pb2.REUSE_MODE_LINKED]
        assert list(listed[1].modes) == [common_pb2.REUSE_MODE_EXACT]


async def test_the_cluster_shows_every_role_and_itself(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], num_prefills=1, node_id="front") as w:
        w.directory.put(record("s", directory_pb2.NODE_ROLE_KVSTORE, draining=True))
        await w.sees(
            lambda view: (
                len(view.nodes(directory_pb2.NODE_ROLE_GATEWAY)) == 1
                and len(view.nodes(directory_pb2.NODE_ROLE_KVSTORE, include_draining=True)) == 1
            )
        )
        cluster = await w.stub.GetCluster(gateway_pb2.GetClusterRequest(), timeout=WAIT_S)
        assert {node.node_id for node in cluster.nodes} == {"a", "prefill-0", "s", "front"}
        assert cluster.directory_reachable
        (own,) = [node for node in cluster.nodes if node.node_id == "front"]
        assert own.address == w.node.server.address
        assert own.metrics_address == w.node.server.metrics_address
        assert own.load.HasField("serving")
        assert own.version


async def test_the_cluster_shows_an_operator_how_far_each_request_has_come(model: Path) -> None:
    may_begin, may_end = asyncio.Event(), asyncio.Event()

    async def in_steps(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        await may_begin.wait()
        async for event in answers(node, request, context):
            if event.HasField("finish"):
                await may_end.wait()
            yield event

    async def shown(w: World) -> list[gateway_pb2.RequestInFlight]:
        return list((await w.stub.GetCluster(gateway_pb2.GetClusterRequest(), timeout=WAIT_S)).requests)

    async with world(model, decodes=[FakeDecode("a", in_steps)]) as w:
        assert await shown(w) == []
        answering = asyncio.create_task(w.generate(text_request("the stones", request_id="first")))
        request = await until(lambda: shown(w), gateway_pb2.REQUEST_PHASE_PREPARING)
        assert (request.request_id, request.decode_node) == ("first", "a")
        assert (request.mode, request.num_generated_tokens) == (common_pb2.REUSE_MODE_EXACT, 0)
        assert request.num_prompt_tokens > 0
        assert request.age_ms >= 0
        assert request.tenant_id == w.node.config.tenant
        assert w.node.gateway.get_cluster().gateway_node_id == w.node.config.node_id
        may_begin.set()
        request = await until(lambda: shown(w), gateway_pb2.REQUEST_PHASE_DECODING)
        assert request.num_generated_tokens > 0
        may_end.set()
        await answering
        await w.idle()
        assert await shown(w) == []


async def until(
    shown: Callable[[], Awaitable[list[gateway_pb2.RequestInFlight]]], phase: int
) -> gateway_pb2.RequestInFlight:
    """The one request, once it has come so far."""
    async with asyncio.timeout(WAIT_S):
        while True:
            requests = await shown()
            if requests and requests[0].phase == phase:
                (request,) = requests
                return request
            await asyncio.sleep(0.005)


async def test_a_gateway_goes_on_with_what_it_knows_when_the_directory_is_away(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")]) as w:
        await w.directory_server.stop(None)
        await w.sees(lambda view: not view.reachable)
        cluster = await w.stub.GetCluster(gateway_pb2.GetClusterRequest(), timeout=WAIT_S)
        assert not cluster.directory_reachable
        assert "a" in {node.node_id for node in cluster.nodes}
        assert (await w.generate(text_request("the stones"))).finish is not None


async def test_tokenize_gives_the_ids_of_a_part(model: Path) -> None:
    own = byte_level_tokenizer()
    async with world(model) as w:
        for text in ("the stones", "<s>[user] é€ 漢字", ""):
            answer = await w.stub.Tokenize(gateway_pb2.TokenizeRequest(text=text), timeout=WAIT_S)
            assert list(answer.token_ids) == own.encode(text, add_special_tokens=False).ids
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await w.stub.Tokenize(gateway_pb2.TokenizeRequest(text="a", model="other"), timeout=WAIT_S)
        assert isinstance(error_from_rpc(caught.value), NotFound)


async def test_oversize_input_is_refused(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], max_prompt_bytes=100, max_message_bytes=5 << 20) as w:
        for size, limit in ((101, "100 bytes"), (6 << 20, "")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await w.generate(text_request("x" * size))
            error = error_from_rpc(caught.value)
            assert isinstance(error, InvalidRequest)
            assert error.limit == limit
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await w.stub.Tokenize(gateway_pb2.TokenizeRequest(text="x" * size), timeout=WAIT_S)
            assert isinstance(error_from_rpc(caught.value), InvalidRequest)
        assert not w.decodes["a"].requests


async def test_a_draining_gateway_ends_streams_that_outlast_its_patience(model: Path) -> None:
    a = FakeDecode("a", hangs)
    async with world(model, decodes=[a]) as w:
        stream = aiter(w.stub.Generate(text_request("the stones"), timeout=WAIT_S))
        await anext(stream)
        drain = asyncio.ensure_future(w.node.server.drain())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
        assert isinstance(error_from_rpc(caught.value), Unavailable)
        await asyncio.wait_for(drain, WAIT_S)
        await asyncio.wait_for(a.ended.wait(), WAIT_S)
        await w.directory.lacks(w.node.config.node_id)
        assert w.node.gateway.num_running == 0


async def test_a_draining_gateway_lets_streams_finish(model: Path) -> None:
    a, hold = FakeDecode("a"), asyncio.Event()

    async def waits(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        events = answers(node, request, context)
        yield await anext(events)
        await hold.wait()
        async for event in events:
            yield event

    a.script = waits
    async with world(model, decodes=[a], drain_timeout_s=WAIT_S) as w:
        call = asyncio.ensure_future(w.generate(text_request("the stones")))
        await asyncio.wait_for(a.started.wait(), WAIT_S)
        drain = asyncio.ensure_future(w.node.server.drain())
        await w.sees(lambda view: view.nodes(directory_pb2.NODE_ROLE_GATEWAY, include_draining=True)[0].draining)
        hold.set()
        assert (await asyncio.wait_for(call, WAIT_S)).finish is not None
        assert await asyncio.wait_for(drain, WAIT_S)


def test_a_gateway_needs_a_directory_and_a_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="directory must be set"):
        GatewayNode(GatewayConfig(model=model))
    with pytest.raises(InvalidRequest, match="model must be set"):
        GatewayNode(GatewayConfig(directory="localhost:1"))
    with pytest.raises(NotFound, match="no readable tokenizer"):
        GatewayNode(GatewayConfig(directory="localhost:1", model=tmp_path))


def test_a_model_is_named_after_its_directory_unless_told(model: Path) -> None:
    assert GatewayConfig(model=model).served_name == model.name
    assert GatewayConfig(model=model / ".." / model.name / "").served_name == model.name
    assert GatewayConfig(model=model, model_name="given").served_name == "given"


@pytest.mark.parametrize("tenant", ["", "a\nb", "é", "x" * 129])
def test_a_tenant_must_fit_into_headers_and_labels(tenant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GatewayConfig(tenant=tenant)
    assert caught.value.field == "tenant"
