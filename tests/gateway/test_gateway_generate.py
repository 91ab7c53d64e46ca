"""A stream goes on when nodes die: with no token lost, none doubled, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs, one
from gateway_fakes import (
    FINGERPRINT,
    UTF8_ANSWER,
    WAIT_S,
    FakeDecode,
    Script,
    answers,
    delta,
    fails_after,
    finish,
    hangs,
    record,
    served_model,
)
from gateway_worlds import World, document_part, text_request, world

from spolia.errors import error_from_rpc
from spolia.v1 import common_pb2, decode_pb2, directory_pb2, gateway_pb2
from spolia_core.errors import (
    Busy,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotSupported,
    SpoliaError,
    Unavailable,
)
from spolia_core.reuse import PREFIX_CHUNK_TOKENS

WHOLE_TEXT = UTF8_ANSWER.text_after[-1]
NUM_TOKENS = len(UTF8_ANSWER.token_ids)


async def failure(w: World, request: gateway_pb2.GenerateRequest, timeout: float = WAIT_S) -> SpoliaError:
    """What the client is told."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await w.generate(request, timeout)
    return error_from_rpc(caught.value)


async def test_an_answer_comes_through_whole(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a]) as w:
        streamed = await w.generate(text_request("the stones", sampling=common_pb2.SamplingParams(seed=7)))
        assert (streamed.token_ids, streamed.text) == (list(UTF8_ANSWER.token_ids), WHOLE_TEXT)
        assert streamed.finish is not None
        assert (streamed.finish.seed, list(streamed.finish.reuse.nodes)) == (7, ["a"])


async def test_a_decode_node_is_told_everything_it_needs(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], num_prefills=2, tenant="museum") as w:
        request = text_request("the stones", request_id="r-1", mode=common_pb2.REUSE_MODE_LINKED)
        request.parts.append(document_part("are cut and set"))
        await w.generate(request)
        (sent,) = a.requests
        assert (sent.request_id, sent.tenant_id, sent.fingerprint) == ("r-1", "museum", FINGERPRINT)
        assert sent.mode == common_pb2.REUSE_MODE_LINKED
        assert [len(part.chunk_id) for part in sent.parts] == [0, 0, 32]
        assert sent.sampling.HasField("seed")
        assert sent.sampling.max_tokens > 0
        assert sorted(sent.prefill_hints) == sorted(fake.address for fake in w.prefills.values())
        assert not sent.HasField("resume")
        assert a.metadata[0]["x-request-id"] == "r-1"


@pytest.mark.parametrize("num_received", range(NUM_TOKENS + 1))
@pytest.mark.parametrize(
    "how",
    [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, Unavailable("draining"), None],
    ids=["unavailable", "cancelled", "internal", "draining", "no-finish"],
)
async def test_a_broken_answer_goes_on_elsewhere(model: Path, num_received: int, how: Any) -> None:
    a, b = FakeDecode("a", fails_after(num_received, how)), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        streamed = await w.generate(text_request("the stones"))
        assert (streamed.token_ids, streamed.text) == (list(UTF8_ANSWER.token_ids), WHOLE_TEXT)
        (first,), (second,) = a.requests, b.requests
        assert second.HasField("resume") == (num_received > 0)
        assert resumed_ids(second) == list(UTF8_ANSWER.token_ids[:num_received])
        text = UTF8_ANSWER.text_after[num_received - 1] if num_received else ""
        assert sum(sample.num_text_code_points for sample in second.resume.samples) == len(text)
        assert (second.request_id, second.sampling.seed) == (first.request_id, first.sampling.seed)
        assert second.parts == first.parts
        assert streamed.finish is not None
        assert list(streamed.finish.reuse.nodes) == ["a", "b"]
        replays = w.node.server.metrics.value("spolia_gateway_replays_total", tenant="default")
        assert replays == (1 if num_received else 0)


async def test_an_answer_goes_on_when_the_server_is_stopped(model: Path) -> None:
    a, b = FakeDecode("a", hangs), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        stream = aiter(w.stub.Generate(text_request("the stones"), timeout=WAIT_S))
        ids = list((await anext(stream)).delta.token_ids)
        await a.server.stop(None)
        async for response in stream:
            ids.extend(response.delta.token_ids)
        assert ids == list(UTF8_ANSWER.token_ids)
        assert resumed_ids(b.requests[0]) == [UTF8_ANSWER.token_ids[0]]


async def test_an_answer_survives_several_deaths(model: Path) -> None:
    nodes = [FakeDecode(f"n{i}", fails_after(2, grpc.StatusCode.UNAVAILABLE)) for i in range(2)]
    nodes.append(FakeDecode("last"))
    async with world(model, decodes=nodes) as w:
        streamed = await w.generate(text_request("the stones"))
        assert (streamed.token_ids, streamed.text) == (list(UTF8_ANSWER.token_ids), WHOLE_TEXT)
        assert resumed_ids(nodes[-1].requests[0]) == list(UTF8_ANSWER.token_ids[:4])
        assert streamed.finish is not None
        assert list(streamed.finish.reuse.nodes) == ["n0", "n1", "last"]


async def test_a_finish_that_was_sent_needs_no_replay(model: Path) -> None:
    async def breaks_after_finish(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in answers(node, request, context):
            yield event
        await context.abort(grpc.StatusCode.UNAVAILABLE, "too late to matter")

    a, b = FakeDecode("a", breaks_after_finish), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        streamed = await w.generate(text_request("the stones"))
        assert streamed.text == WHOLE_TEXT
        assert not b.requests


async def test_an_answer_waits_for_a_node_to_come_back(model: Path) -> None:
    a = FakeDecode("a", fails_after(3, grpc.StatusCode.UNAVAILABLE))
    async with world(model, decodes=[a]) as w:
        stream = aiter(w.stub.Generate(text_request("the stones"), timeout=WAIT_S))
        ids: list[int] = []
        while len(ids) < 3:
            ids.extend((await anext(stream)).delta.token_ids)
        a.script = answers
        w.directory.remove("a")
        await w.sees(lambda view: not view.nodes(directory_pb2.NODE_ROLE_DECODE))
        w.directory.put(record("a-restarted", address=a.address))
        async for response in stream:
            ids.extend(response.delta.token_ids)
        assert ids == list(UTF8_ANSWER.token_ids)


async def test_a_broken_answer_outlasts_a_busy_node(model: Path) -> None:
    """Refusals in the middle of an answer are waited out: they cost no attempt, only patience."""
    refusals = 0

    async def busy_for_a_while(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal refusals
        if refusals < 5:
            refusals += 1
            raise Busy("full", retry_after_ms=5)
        async for event in answers(node, request, context):
            yield event

    a, b = FakeDecode("a", fails_after(3, grpc.StatusCode.UNAVAILABLE)), FakeDecode("b", busy_for_a_while)
    async with world(model, decodes=[a, b], max_attempts=2) as w:
        streamed = await w.generate(text_request("the stones"))
        assert (streamed.token_ids, streamed.text) == (list(UTF8_ANSWER.token_ids), WHOLE_TEXT)
        assert refusals == 5


async def test_patience_for_a_broken_answer_ends(model: Path) -> None:
    a = FakeDecode("a", fails_after(3, grpc.StatusCode.UNAVAILABLE))
    async with world(model, decodes=[a], replay_patience_s=0.3) as w:
        error = await failure(w, text_request("the stones"))
        assert isinstance(error, Unavailable)
        assert "node a" in error.message


@pytest.mark.parametrize("refusal", [Busy("full", retry_after_ms=50), Unavailable("draining")])
async def test_a_node_that_refuses_is_passed_over(model: Path, refusal: SpoliaError) -> None:
    a, b = FakeDecode("a", fails_after(0, refusal)), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        streamed = await w.generate(text_request("the stones"))
        assert streamed.text == WHOLE_TEXT
        assert len(a.requests) == 1
        assert not b.requests[0].HasField("resume")


async def test_busy_nodes_are_reported_at_once_with_their_hint(model: Path) -> None:
    nodes = [
        FakeDecode("a", fails_after(0, Busy("full", retry_after_ms=70))),
        FakeDecode("b", fails_after(0, grpc.StatusCode.UNAVAILABLE)),
    ]
    async with world(model, decodes=nodes) as w:
        error = await failure(w, text_request("the stones"))
        assert isinstance(error, Busy)
        assert error.retry_after_ms == 70
        assert [len(node.requests) for node in nodes] == [1, 1]


async def test_a_request_that_kills_nodes_stops_at_max_attempts(model: Path) -> None:
    nodes = [FakeDecode(f"n{i}", fails_after(0, grpc.StatusCode.UNAVAILABLE)) for i in range(4)]
    async with world(model, decodes=nodes, max_attempts=2) as w:
        assert isinstance(await failure(w, text_request("the stones")), Unavailable)
        assert sum(len(node.requests) for node in nodes) == 2


@pytest.mark.parametrize("error", [InvalidRequest("no", field="parts"), NotSupported("no")])
async def test_what_no_node_would_take_is_not_tried_twice(model: Path, error: SpoliaError) -> None:
    a, b = FakeDecode("a", fails_after(0, error)), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        with captured_logs() as lines:
            told = await failure(w, text_request("the stones"))
        assert (type(told), told.message, told.field) == (type(error), error.message, error.field)
        assert one(lines, "attempt failed")["log_level"] == "debug", "a caller's mistake is no warning"
        assert not b.requests


async def test_a_rule_that_broke_on_a_node_is_for_its_log_and_is_not_tried_twice(model: Path) -> None:
    a, b = FakeDecode("a", fails_after(0, InternalError("bug"))), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        with captured_logs() as lines:
            told = await failure(w, text_request("the stones", request_id="r-7"))
        assert type(told) is InternalError
        assert "request r-7 failed on node a" in told.message
        assert "bug" not in told.message
        line = one(lines, "attempt failed")
        assert (line["log_level"], line["said"]) == ("warning", f"{a.address}: INTERNAL: bug")
        assert not b.requests


async def test_a_node_that_changed_its_model_is_passed_over(model: Path) -> None:
    a, b = FakeDecode("a", fails_after(0, NotSupported("another model", field="fingerprint"))), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        assert (await w.generate(text_request("the stones"))).text == WHOLE_TEXT


def says(*events: Any) -> Script:
    async def script(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        for event in events:
            yield event

    return script


@pytest.mark.parametrize(
    "events",
    [
        (delta(0, (5,), "a", 0), delta(0, (5,), "a", 0), finish("a", 2)),
        (delta(0, (5,), "a", 0), delta(2, (5,), "b", 1), finish("a", 2)),
        (delta(0, (5,), "a", 0), delta(1, (5,), "b", 0), finish("a", 2)),
        (delta(0, (5,), "a", 0), delta(1, (5,), "b", 2), finish("a", 2)),
        (delta(0, (5,), "a", 0), finish("a", 2)),
    ],
    ids=["token doubled", "token lost", "text doubled", "text lost", "finish counts others"],
)
async def test_a_token_lost_or_doubled_is_never_passed_on(model: Path, events: tuple[Any, ...]) -> None:
    async with world(model, decodes=[FakeDecode("a", says(*events))]) as w:
        stream = aiter(w.stub.Generate(text_request("the stones"), timeout=WAIT_S))
        assert list((await anext(stream)).delta.token_ids) == [5]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
        assert isinstance(error_from_rpc(caught.value), InternalError)


async def test_dropping_a_stream_ends_the_work_on_the_decode_node(model: Path) -> None:
    a = FakeDecode("a", hangs)
    async with world(model, decodes=[a]) as w:
        call = w.stub.Generate(text_request("the stones"), timeout=WAIT_S)
        await call.read()
        assert (a.num_running, w.node.gateway.num_running) == (1, 1)
        call.cancel()
        await asyncio.wait_for(a.ended.wait(), WAIT_S)
        await w.idle()
        assert (a.num_running, w.node.gateway.num_running) == (0, 0)


async def test_a_clients_deadline_reaches_the_decode_node(model: Path) -> None:
    a = FakeDecode("a", hangs)
    async with world(model, decodes=[a]) as w:
        error = await failure(w, text_request("the stones"), timeout=2.0)
        assert isinstance(error, DeadlineExceeded)
        assert 0 < a.remaining_s[0] < 3.0  # not the gateway's own minutes; gRPC rounds a little
        await asyncio.wait_for(a.ended.wait(), WAIT_S)
        await w.idle()
        assert w.node.gateway.num_running == 0


async def test_a_client_without_deadline_gets_the_gateways(model: Path) -> None:
    a = FakeDecode("a", hangs)
    async with world(model, decodes=[a], default_timeout_s=2.0) as w:
        stream = aiter(w.stub.Generate(text_request("the stones")))
        await anext(stream)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
        assert isinstance(error_from_rpc(caught.value), DeadlineExceeded)


async def test_no_decode_node_is_said_precisely(model: Path) -> None:
    async with world(model) as w:
        error = await failure(w, text_request("the stones"))
        assert isinstance(error, Unavailable)
        assert "no decode node serves model 'tiny'" in error.message
    async with world(model, decodes=[FakeDecode("a")], served=served_model(name="other")) as w:
        assert "'other'" in (await failure(w, text_request("the stones"))).message


async def test_a_replay_stays_with_the_fingerprint_its_ids_were_made_for(model: Path) -> None:
    a, b = FakeDecode("a", fails_after(2, grpc.StatusCode.UNAVAILABLE)), FakeDecode("b")
    async with world(model, decodes=[a, b], replay_patience_s=0.2) as w:
        w.directory.put(record("b", address=b.address, model=served_model(fingerprint=b"\x08" * 32)))
        for node_id in ("c", "d"):  # the wanted fingerprint is on most nodes, so it is the one chosen
            w.directory.put(record(node_id, address="127.0.0.1:1", num_running=500))
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == 4)
        assert isinstance(await failure(w, text_request("the stones")), Unavailable)
        assert a.requests
        assert not b.requests


async def test_linked_goes_only_where_it_is_served(model: Path) -> None:
    a, b = FakeDecode("a"), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        w.directory.put(record("a", address=a.address, model=served_model(linked_refusal="it loses 3 points")))
        await w.sees(lambda view: any(n.model.linked_refusal for n in view.nodes(directory_pb2.NODE_ROLE_DECODE)))
        await w.generate(text_request("the stones", mode=common_pb2.REUSE_MODE_LINKED))
        assert (len(a.requests), len(b.requests)) == (0, 1)
        await w.generate(text_request("the stones", mode=common_pb2.REUSE_MODE_LINKED, force_linked=True))
        assert (len(a.requests), len(b.requests)) == (1, 1)


async def test_a_full_gateway_says_when_to_come_back(model: Path) -> None:
    a = FakeDecode("a", hangs)
    async with world(model, decodes=[a], max_requests=1) as w:
        call = w.stub.Generate(text_request("the stones"), timeout=WAIT_S)
        await call.read()
        error = await failure(w, text_request("the stones"))
        assert isinstance(error, Busy)
        assert error.retry_after_ms > 0
        call.cancel()


async def test_repeats_of_an_exact_prompt_land_on_one_node(model: Path) -> None:
    nodes = [FakeDecode(f"n{i}") for i in range(4)]
    async with world(model, decodes=nodes) as w:
        for node in nodes:
            w.directory.put(record(node.node_id, address=node.address))
        await w.sees(lambda view: not any(n.load.num_running for n in view.nodes(directory_pb2.NODE_ROLE_DECODE)))
        for question in ("one", "two", "three"):
            await w.generate(text_request("the stones of one building " * 30, question))
        asked = [request for node in nodes for request in node.requests]
        assert all(len(request.parts[1].token_ids) >= PREFIX_CHUNK_TOKENS for request in asked)
        chosen = {node.node_id for node in nodes if node.requests}
        assert len(chosen) == 1


async def test_a_burst_does_not_fall_on_one_node(model: Path) -> None:
    nodes = [FakeDecode(f"n{i}", hangs) for i in range(4)]
    async with world(model, decodes=nodes) as w:
        for node in nodes:
            w.directory.put(record(node.node_id, address=node.address))
        await w.sees(lambda view: not any(n.load.num_running for n in view.nodes(directory_pb2.NODE_ROLE_DECODE)))
        calls = []
        for _ in range(8):
            calls.append(w.stub.Generate(text_request("the stones"), timeout=WAIT_S))
            await calls[-1].read()
        assert [node.num_running for node in nodes] == [2, 2, 2, 2]
        for call in calls:
            call.cancel()


def resumed_ids(request: decode_pb2.DecodeServiceGenerateRequest) -> list[int]:
    """What a node is told of the only sample."""
    return [token_id for sample in request.resume.samples for token_id in sample.token_ids]
