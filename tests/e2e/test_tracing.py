"""One request, one trace: its spans on every node, whose child each is, and what they say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from collector import Collector, a_collector
from tiny_cluster import TENANT, WAIT_S, World, a_world
from tiny_gateway import a_gateway

from spolia.v1 import common_pb2, gateway_pb2
from spolia.v1.directory_pb2 import NODE_ROLE_DECODE
from spolia.v1.gateway_pb2_grpc import GatewayServiceStub
from spolia_decode.node import DecodeNode
from spolia_gateway.node import GatewayNode
from spolia_node.deadline import Deadline

TEXTS = ["TheLighthouseStoodAtTheEndOfTheLongPier.", "EveryMorningTheBakerOpenedHerShop." * 2, "ABoatCame." * 6]
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01"),)
UNSAMPLED = (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-00"),)
GENERATE = "spolia.v1.GatewayService/Generate"


@dataclass
class Traced:
    """A store, a prefill node and two decode nodes behind a gateway, all of which export their spans."""

    world: World
    gateway: GatewayNode
    collector: Collector
    channel: grpc.aio.Channel
    ending: AsyncExitStack

    async def ask(self, request: gateway_pb2.GenerateRequest, metadata: Any = ()) -> common_pb2.Finish:
        call = GatewayServiceStub(self.channel).Generate(request, timeout=WAIT_S, metadata=metadata)
        responses = [response async for response in call]
        return responses[-1].finish

    async def spans(self) -> Collector:
        """What was collected, once every node has ended."""
        for worker in self.world.workers:
            if isinstance(worker, DecodeNode):
                await worker.parts.publisher.drain()  # what is published in the background is in the trace too
        await self.ending.aclose()
        return self.collector


@asynccontextmanager
async def a_traced_cluster(model: Path, **decode_settings: Any) -> AsyncIterator[Traced]:
    async with a_collector() as collector, AsyncExitStack() as stack:
        endpoint = collector.endpoint
        world = await stack.enter_async_context(a_world(model))
        await world.store(tracing_endpoint=endpoint)
        await world.prefill(tracing_endpoint=endpoint)
        for _ in range(2):
            await world.decode(tracing_endpoint=endpoint, **decode_settings)
        gateway = await stack.enter_async_context(a_gateway(world, TENANT, tracing_endpoint=endpoint, http_port=0))
        await gateway.cluster.wait_for(lambda v: len(v.nodes(NODE_ROLE_DECODE)) == 2, Deadline.after(WAIT_S))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(gateway.server.address))
        yield Traced(world, gateway, collector, channel, stack)


def linked(*texts: str) -> gateway_pb2.GenerateRequest:
    documents = [gateway_pb2.PromptPart(document=gateway_pb2.Document(text=text)) for text in texts]
    return gateway_pb2.GenerateRequest(
        request_id="the-request",
        parts=[*documents, gateway_pb2.PromptPart(text="WHO?")],
        mode=common_pb2.REUSE_MODE_LINKED,
        sampling=common_pb2.SamplingParams(max_tokens=6, ignore_eos=True),
    )


async def test_a_linked_request_is_one_trace_through_every_node(tiny: Path) -> None:
    async with a_traced_cluster(tiny) as traced:
        finish = await traced.ask(linked(*TEXTS), SAMPLED)
        spans = await traced.spans()
    assert {span.trace_id for span in spans.spans} == {TRACE_ID}
    root = spans.one(GENERATE)
    assert root.parent_id == SPAN_ID, "the client's span"
    by_id = {span.span_id: span for span in spans.spans}
    assert all(span.parent_id in by_id for span in spans.spans if span is not root), spans.drawn()
    for span in spans.spans:
        assert not span.is_error, (span, spans.drawn())
        assert span.start_ns >= root.start_ns
    services = {span.service for span in spans.spans}
    assert services == {"spolia-gateway", "spolia-decode", "spolia-prefill", "spolia-kvstore"}
    paths = {" > ".join(spans.path(span)) for span in spans.spans}
    decode = "GatewayService/Generate > DecodeService/Generate"
    fetch = f"{decode} > prepare > fetch"
    prefill = f"{fetch} > compile request > PrefillService/Prefill"
    assert paths >= {
        "GatewayService/Generate",
        "GatewayService/Generate > tokenize",
        "GatewayService/Generate > route",
        decode,
        f"{decode} > wait",
        f"{decode} > prepare",
        f"{decode} > decode",
        fetch,
        f"{fetch} > KVStoreService/Lookup",
        f"{fetch} > compile request",
        f"{decode} > prepare > link",
        prefill,
        f"{prefill} > compute",
        f"{prefill} > put",
        f"{prefill} > put > KVStoreService/Put",
    }, spans.drawn()
    gets = spans.named("spolia.v1.KVStoreService/Get")
    assert len(gets) == len(TEXTS)
    assert {spans.parent(get).name for get in gets} == {"get"}
    # What the spans say is what the answer says.
    assert root.attributes["request_id"] == "the-request"
    assert root.attributes["num_prompt_tokens"] == finish.num_prompt_tokens
    assert root.attributes["num_generated_tokens"] == finish.num_generated_tokens == 6
    assert spans.one("decode").attributes["num_tokens"] == 6
    assert spans.one("spolia.v1.DecodeService/Generate").node_id == spans.one("route").attributes["node"]
    assert sum(span.attributes["num_bytes"] for span in spans.named("get")) == sum(
        transfer.chunk_bytes for transfer in finish.reuse.transfers
    )
    computed = [span.attributes["num_tokens"] for span in spans.named("compute", "spolia-prefill")]
    assert sum(computed) == sum(map(len, TEXTS))
    assert spans.one("link").attributes["num_tokens"] < finish.num_prompt_tokens
    # And cache events stand where they happened.
    events = [(name, said) for span in spans.spans for name, said in span.events]
    assert {name for name, _ in events} == {"cache.miss", "cache.put", "cache.hit"}
    assert sum(name == "cache.put" for name, _ in events) == len(TEXTS)
    assert {said["reason"] for name, said in events if name == "cache.miss"} == {"not_found"}
    hits = [said for get in gets for name, said in get.events if name == "cache.hit"]
    assert [hit["tier"] for hit in hits] == ["ram"] * len(TEXTS)
    texts = repr(spans.spans)
    assert not any(text[:20] in texts for text in TEXTS), "no text leaves with a span"


async def test_an_exact_request_is_transferred_from_a_prefill_node_and_published(tiny: Path) -> None:
    request = gateway_pb2.GenerateRequest(
        parts=[gateway_pb2.PromptPart(text="ItRained." * 40)],
        sampling=common_pb2.SamplingParams(max_tokens=3, ignore_eos=True),
    )
    async with a_traced_cluster(tiny, local_prefill_tokens=0) as traced:
        finish = await traced.ask(request)
        spans = await traced.spans()
    assert len({span.trace_id for span in spans.spans}) == 1
    assert spans.one(GENERATE).parent_id == "", "the gateway began it"
    transfer = spans.one("transfer")
    assert transfer.attributes["num_bytes"] == sum(t.live_bytes for t in finish.reuse.transfers) > 0
    prefill = spans.one("spolia.v1.PrefillService/Prefill")
    assert spans.parent(prefill) is transfer
    assert spans.parent(spans.one("compute")) is prefill
    puts = spans.named("put", "spolia-decode")
    assert len(puts) == finish.num_prompt_tokens // 128
    assert all(spans.path(put)[-2:] == ["prepare", "put"] for put in puts), spans.drawn()


async def test_a_request_over_http_is_one_trace_too(tiny: Path) -> None:
    async with a_traced_cluster(tiny) as traced:
        url = f"http://{traced.gateway.http_address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=WAIT_S, max_retries=0) as client:
            await client.models.list()  # no span: it asks no other node
            answer = await client.completions.create(
                model=traced.gateway.config.served_name,
                prompt="WHO?",
                max_tokens=6,
                stream=True,
                extra_body={"documents": TEXTS, "reuse": "linked"},
                extra_headers={**dict(SAMPLED), "x-request-id": "the-request"},
            )
            assert [chunk.choices[0].finish_reason async for chunk in answer][-1] == "length"
        spans = await traced.spans()
    assert {span.trace_id for span in spans.spans} == {TRACE_ID}
    root = spans.one("POST /v1/completions")
    assert root.parent_id == SPAN_ID, "the client's span"
    by_id = {span.span_id: span for span in spans.spans}
    assert all(span.parent_id in by_id for span in spans.spans if span is not root), spans.drawn()
    assert {span.service for span in spans.spans} == {
        "spolia-gateway",
        "spolia-decode",
        "spolia-prefill",
        "spolia-kvstore",
    }
    decode = "POST /v1/completions > DecodeService/Generate"
    fetch = f"{decode} > prepare > fetch"
    assert {" > ".join(spans.path(span)) for span in spans.spans} >= {
        "POST /v1/completions > tokenize",
        "POST /v1/completions > route",
        f"{decode} > decode",
        f"{decode} > prepare > link",
        f"{fetch} > compile request > PrefillService/Prefill > put > KVStoreService/Put",
        f"{fetch} > compile request > get > KVStoreService/Get",
    }, spans.drawn()
    assert root.attributes["http.route"] == "/v1/completions"
    assert root.attributes["request_id"] == "the-request"
    assert root.attributes["num_generated_tokens"] == 6
    # It ends when the last byte has gone, not when the answer begins.
    assert root.end_ns >= spans.one("decode").end_ns


async def test_an_answer_that_moves_to_another_node_stays_one_trace(tiny: Path) -> None:
    request = linked(*TEXTS)
    request.sampling.max_tokens = 400
    async with a_traced_cluster(tiny) as traced:
        call = GatewayServiceStub(traced.channel).Generate(request, timeout=WAIT_S, metadata=SAMPLED)
        responses = aiter(call)
        await anext(responses)
        decodes = [worker for worker in traced.world.workers if isinstance(worker, DecodeNode)]
        busy = next(node for node in decodes if node.batch.num_sequences)
        await traced.world.kill(busy)
        *_, last = [response async for response in responses]
        assert last.finish.num_generated_tokens == 400
        spans = await traced.spans()
    assert {span.trace_id for span in spans.spans} == {TRACE_ID}
    first, second = sorted(spans.named("spolia.v1.DecodeService/Generate"), key=lambda span: span.start_ns)
    assert (first.node_id, first.attributes["status"], first.is_error) == (busy.config.node_id, "UNAVAILABLE", True)
    assert (second.attributes["status"], second.is_error) == ("OK", False)
    assert (first.attributes["is_replay"], second.attributes["is_replay"]) == (False, True)
    assert [route.attributes["num_attempts"] for route in spans.named("route")] == [0, 1]
    assert sum(span.attributes["num_tokens"] for span in spans.named("decode")) == 400


async def test_what_the_client_does_not_sample_nobody_exports(tiny: Path) -> None:
    async with a_traced_cluster(tiny) as traced:
        await traced.ask(linked(*TEXTS), UNSAMPLED)
        spans = await traced.spans()
    assert spans.spans == []


async def test_a_request_that_fails_says_so_in_its_trace(tiny: Path) -> None:
    async with a_traced_cluster(tiny) as traced:
        with pytest.raises(grpc.aio.AioRpcError):
            await traced.ask(gateway_pb2.GenerateRequest(model="another", parts=[gateway_pb2.PromptPart(text="A")]))
        spans = await traced.spans()
    root = spans.one(GENERATE)
    assert root.is_error
    assert root.message == root.attributes["status"] == "NOT_FOUND"
