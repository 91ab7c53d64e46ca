"""Nothing that a user is told of a failure names an address inside; the log does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from captured_logs import captured_logs
from gateway_fakes import WAIT_S, FakeDecode, Script, fails_after, hangs
from gateway_worlds import World, text_request
from http_worlds import HttpWorld, http_world
from streamed_fakes import ManyDecode, known

from spolia.errors import DETAIL_KEY, error_from_rpc
from spolia.v1 import gateway_pb2
from spolia.v1.common_pb2 import ErrorDetail
from spolia_core.errors import (
    Cancelled,
    DataCorrupt,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    SpoliaError,
    Unauthenticated,
    Unavailable,
)
from spolia_node.channels import ChannelPool

PEER, NAME = "10.9.8.7:7400", "prefill-0.prefill.spolia.svc.cluster.local:7400"
SAID = f"failed to connect to all addresses; last error: UNKNOWN: ipv4:{PEER}: {NAME}: connection refused"
"""What gRPC and nodes say of a connection."""

INSIDE: list[type[SpoliaError]] = [
    Cancelled,
    DataCorrupt,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    Unauthenticated,
    Unavailable,
]
TOLD_AS: dict[type[SpoliaError], type[SpoliaError]] = dict.fromkeys(
    (Cancelled, Forbidden, Unauthenticated), Unavailable
)

BARE = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
"""As gRPC, or a proxy on the way, ends calls."""

NUM_NODES = 6
"""More than a test loses."""


def error(kind: type[SpoliaError]) -> SpoliaError:
    return kind(SAID, limit=PEER, actual=NAME)


def aborts(num_tokens: int, code: grpc.StatusCode) -> Script:
    """A bare status behind a part of the answer, with gRPC's words."""

    async def script(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        async for step in fails_after(num_tokens, None)(node, request, context):
            yield step
        await context.abort(code, SAID)

    return script


def decodes(script: Script, kind: type[FakeDecode] = FakeDecode) -> list[FakeDecode]:
    return [kind(f"d{number}", script) for number in range(NUM_NODES)]


def met_at(model: Path, nodes: Sequence[FakeDecode], **changes: Any) -> Any:
    """A gateway that gives up soon."""
    return http_world(model, nodes, **({"max_attempts": 1, "replay_patience_s": 0.0} | changes))


def check(w: World, told: str) -> None:
    """Nothing in `told` says where a node is, or a part of it."""
    inner = [fake.address for fake in (*w.decodes.values(), *w.prefills.values())]
    ports = [f":{address.rpartition(':')[2]}" for address in (*inner, w.node.config.directory)]
    for word in (PEER, NAME, "10.9.8.7", "svc.cluster.local", ":7400", "ipv4:", "ipv6:", "unix:", *inner, *ports):
        assert word not in told, (word, told)


async def failed(w: World, call: Any) -> tuple[str, SpoliaError]:
    """All that a client of gRPC gets of a call that fails: its words, its trailers, and what the SDK makes of it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_read(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    said = caught.value
    trailers = [(key, value) for key, value in said.trailing_metadata() or ()]
    details = [str(ErrorDetail.FromString(value)) for key, value in trailers if key == DETAIL_KEY]
    assert details, "the gateway says what kind of error it is"
    told = f"{said.details()} {trailers} {details}"
    check(w, told)
    return told, error_from_rpc(said)


async def _read(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def over_http(met: HttpWorld, *, streams: bool) -> tuple[str, str]:
    """All of an answer, and its request's id."""
    body = {"model": "tiny", "prompt": "the stones", "stream": streams}
    answer = await met.http.post("/v1/completions", json=body)
    told = f"{answer.status_code} {answer.headers.multi_items()} {answer.text}"
    check(met.world, told)
    return answer.text, answer.headers["x-request-id"]


async def ask_every_door(met: HttpWorld, kind: type[SpoliaError] | None, *, begins: bool) -> None:
    """Over gRPC, and over HTTP whole and streamed. Of what class the error is, and whose request it was, is told."""
    told, raised = await failed(met.world, met.world.stub.Generate(text_request("the stones", request_id="r-1")))
    assert kind is None or type(raised) is kind, told
    assert "r-1" in raised.message
    text, request_id = await over_http(met, streams=False)
    assert request_id in json.loads(text)["error"]["message"]
    text, request_id = await over_http(met, streams=True)
    last = text.removesuffix("\n\n").rpartition("data: ")[2] if begins else text
    assert request_id in json.loads(last)["error"]["message"]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("fake", [FakeDecode, ManyDecode])
async def test_what_a_node_says_of_those_inside_is_for_the_log(
    model: Path, fake: type[FakeDecode], kind: type[SpoliaError], begins: bool
) -> None:
    nodes = decodes(fails_after(2 if begins else 0, error(kind)), fake)
    async with met_at(model, nodes) as met:
        if fake is ManyDecode:
            await known(met.world, *nodes)
        with captured_logs() as lines:
            await ask_every_door(met, TOLD_AS.get(kind, kind), begins=begins)
        said = [line["said"] for line in lines if line["event"] == "attempt failed"]
        assert len(said) >= 3
        assert all(SAID in line for line in said)
        assert all(any(line.startswith(node.address) for node in nodes) for line in said)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("code", BARE)
async def test_what_grpc_says_of_a_connection_is_for_the_log(model: Path, code: grpc.StatusCode, begins: bool) -> None:
    async with met_at(model, decodes(aborts(2 if begins else 0, code))) as met:
        with captured_logs() as lines:
            await ask_every_door(met, None, begins=begins)
        assert all(SAID in line["said"] for line in lines if line["event"] == "attempt failed")


async def test_a_node_that_nobody_answers_at_is_told_without_its_address(model: Path) -> None:
    nodes = decodes(hangs)
    async with met_at(model, nodes) as met:
        for node in nodes:
            await node.server.stop(None)
        with captured_logs() as lines:
            await ask_every_door(met, Unavailable, begins=False)
        assert all(any(node.address in line["said"] for node in nodes) for line in lines if "said" in line)


@pytest.mark.parametrize("end", ["silence", "stream", "channel"])
async def test_a_node_lost_within_an_answer_is_told_without_its_address(model: Path, end: str) -> None:
    """It ends its answer without a finish; the stream that carries answers breaks; the channel is closed."""
    nodes = decodes(fails_after(2, None) if end == "silence" else hangs, ManyDecode if end == "stream" else FakeDecode)
    async with met_at(model, nodes) as met:
        w = met.world
        if end == "stream":
            await known(w, *nodes)
        call = w.stub.Generate(text_request("the stones", request_id="r-1"), timeout=WAIT_S)
        assert (await call.read()).delta.token_ids
        [busy] = [node for node in nodes if node.requests]
        if isinstance(busy, ManyDecode):
            busy.break_streams()
        elif end == "channel":
            channels: ChannelPool = w.node._channels
            channels.drop(busy.address)
        told, raised = await failed(w, call)
        assert isinstance(raised, Unavailable)
        assert raised.message == f"node {busy.node_id} was lost while it worked on request r-1; try again", told


async def test_a_gateway_that_ends_names_no_node_it_would_have_asked(model: Path) -> None:
    async with met_at(model, decodes(hangs)) as met:
        await met.world.node._channels.close()
        await failed(met.world, met.world.stub.Generate(text_request("the stones")))


@pytest.mark.parametrize("kind", INSIDE)
async def test_warming_and_forgetting_name_no_address(model: Path, kind: type[SpoliaError]) -> None:
    nodes = decodes(hangs)
    async with met_at(model, nodes, num_prefills=2) as met:
        w, documents = met.world, [gateway_pb2.Document(text="the stones")]
        for node in nodes:
            node.drop_error = error(kind)
        with captured_logs() as lines:
            told, _ = await failed(w, w.stub.Forget(gateway_pb2.ForgetRequest(documents=documents)))
        assert all(node.node_id in told for node in nodes)
        said = [line["said"] for line in lines if line["event"] == "node did not forget"]
        assert all(any(SAID in line and node.address in line for line in said) for node in nodes)
        for prefill in w.prefills.values():
            prefill.error = error(kind)
        _, raised = await failed(w, w.stub.Warm(gateway_pb2.WarmRequest(documents=documents, request_id="w-1")))
        assert type(raised) is TOLD_AS.get(kind, kind)
        assert "w-1" in raised.message


@pytest.mark.parametrize("kind", INSIDE)
async def test_a_store_that_fails_is_told_without_its_address(model: Path, kind: type[SpoliaError]) -> None:
    async with met_at(model, decodes(hangs), num_prefills=1) as met:
        w, documents = met.world, [gateway_pb2.Document(text="the stones")]
        w.store.lookup_error = w.store.delete_error = error(kind)
        with captured_logs() as lines:
            await failed(w, w.stub.Warm(gateway_pb2.WarmRequest(documents=documents)))
            told, _ = await failed(w, w.stub.Forget(gateway_pb2.ForgetRequest(documents=documents)))
        assert "store" in told
        assert [
            line for line in lines if line["event"] in ("store not reached", "store failed") and SAID in line["error"]
        ]


async def test_a_store_that_nobody_answers_at_is_told_without_its_address(model: Path) -> None:
    async with met_at(model, decodes(hangs), num_prefills=1) as met:
        w, documents = met.world, [gateway_pb2.Document(text="the stones")]
        await w.directory_server.stop(None)
        for call in (
            w.stub.Warm(gateway_pb2.WarmRequest(documents=documents)),
            w.stub.Forget(gateway_pb2.ForgetRequest(documents=documents)),
        ):
            _, raised = await failed(w, call)
            assert isinstance(raised, Unavailable)
