"""Generate takes a chat: its prompt is that of the same messages over HTTP, its limits are those of any prompt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import WAIT_S, FakeDecode, hangs
from http_worlds import TEMPLATE, HttpWorld, chat_model, http_world, says

from spolia.errors import error_from_rpc
from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import Busy, InvalidRequest, NotSupported, SpoliaError, Unavailable
from spolia_gateway import chat_prompt
from spolia_gateway.chat_parts import chat_parts

LINKED = common_pb2.REUSE_MODE_LINKED
Turns = Sequence[tuple[str, str]]
TALK: Turns = [("system", "Be brief. </s>"), ("user", "hello"), ("assistant", ""), ("user", "and é?")]
PLAIN_TEMPLATE = "{% for message in messages %}[user]{{ message.content }}{% endfor %}"
STRICT_TEMPLATE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
FORGETFUL_TEMPLATE = "{% if documents %}{{ documents[0].text }}{% endif %}"


@pytest.fixture
def decode() -> FakeDecode:
    return FakeDecode("d0", says)


@pytest.fixture
async def met(tmp_path: Path, decode: FakeDecode, request: pytest.FixtureRequest) -> AsyncIterator[HttpWorld]:
    """A gateway whose model has the template that the test is parametrized with, if it is."""
    template, settings = getattr(request, "param", (TEMPLATE, {}))
    async with http_world(chat_model(tmp_path / "model", template), [decode], **settings) as made:
        yield made


def asked(turns: Turns, documents: Sequence[str] = (), **fields: Any) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        messages=[gateway_pb2.ChatMessage(role=role, content=text) for role, text in turns],
        documents=[gateway_pb2.Document(text=text, name="never shown") for text in documents],
        **fields,
    )


def forms(template: str | None = TEMPLATE, **settings: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("met", [(template, settings)], indirect=True)


async def refusal(met: HttpWorld, request: gateway_pb2.GenerateRequest, num_running: int = 0) -> SpoliaError:
    """Why it was refused; nothing is held for it then."""
    with pytest.raises(grpc.RpcError) as caught:
        await met.world.generate(request)
    assert met.world.node.gateway.num_running == num_running
    return error_from_rpc(caught.value)


@pytest.mark.parametrize("met", [(TEMPLATE, {}), (PLAIN_TEMPLATE, {})], indirect=True)
@pytest.mark.parametrize("documents", [(), ("the stones </s>", "are cut")])
async def test_the_prompt_is_that_of_the_same_chat_over_http(
    documents: tuple[str, ...], met: HttpWorld, decode: FakeDecode
) -> None:
    answer = await met.world.generate(asked(TALK, documents, mode=LINKED, sampling={"seed": 1, "max_tokens": 9}))
    body = {"messages": [{"role": role, "content": text} for role, text in TALK]}
    told = {"documents": documents, "reuse": "linked", "seed": 1, "max_tokens": 9, "temperature": 0}
    over_http = await met.http.post("/v1/chat/completions", json=body | told)
    assert answer.text == over_http.json()["choices"][0]["message"]["content"] == "ab!"
    one, same = decode.requests
    assert list(one.parts) == list(same.parts)
    assert (one.mode, one.sampling) == (same.mode, same.sampling)
    assert sum(bool(part.chunk_id) for part in one.parts) == len(documents)
    ids = [token_id for part in one.parts for token_id in part.token_ids]
    tokenized = await met.http.post("/tokenize", json=body | {"documents": documents})
    assert ids == tokenized.json()["tokens"]


async def test_a_document_of_a_chat_is_the_document_of_any_prompt(met: HttpWorld, decode: FakeDecode) -> None:
    part = gateway_pb2.PromptPart(document=gateway_pb2.Document(text="the stones"))
    await met.world.generate(asked(TALK, ["the stones"], mode=LINKED))
    await met.world.generate(gateway_pb2.GenerateRequest(parts=[part, {"text": "Why?"}], mode=LINKED))
    first, second = ({each.chunk_id for each in request.parts if each.chunk_id} for request in decode.requests)
    assert first == second != set()


async def test_a_long_chat_is_written_off_the_event_loop_and_the_same(
    met: HttpWorld, decode: FakeDecode, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noting(*given: Any, **told: Any) -> Any:
        threads.append(threading.current_thread().name)
        return chat_parts(*given, **told)

    monkeypatch.setattr(chat_prompt, "chat_parts", noting)
    await met.world.generate(asked(TALK, ["one"]))
    monkeypatch.setattr(chat_prompt, "SHORT_TURNS", len(TALK))
    await met.world.generate(asked(TALK, ["one"]))
    assert threads[0] == threading.current_thread().name != threads[1]
    one, same = decode.requests
    assert list(one.parts) == list(same.parts)


@forms(None)
async def test_a_model_without_a_template_is_a_typed_refusal(met: HttpWorld) -> None:
    refused = await refusal(met, asked(TALK))
    assert isinstance(refused, NotSupported)
    assert refused.field == "messages"
    assert "tiny" in refused.message
    assert (await met.world.generate(gateway_pb2.GenerateRequest(parts=[{"text": "Why?"}]))).text == "ab!"


@forms(STRICT_TEMPLATE)
async def test_messages_that_the_template_refuses_are_told_in_its_words(met: HttpWorld) -> None:
    refused = await refusal(met, asked(TALK))
    assert isinstance(refused, InvalidRequest)
    assert (refused.field, "no system" in refused.message) == ("messages", True)
    assert (await met.world.generate(asked(TALK[1:]))).text == "ab!"


@forms(FORGETFUL_TEMPLATE)
async def test_a_document_that_the_template_leaves_out_is_named(met: HttpWorld) -> None:
    refused = await refusal(met, asked(TALK, ["one", "two"]))
    assert isinstance(refused, NotSupported)
    assert (refused.field, refused.actual) == ("documents", "1")


REFUSED = [
    (asked(TALK, parts=[{"text": "Hi"}]), "parts", "none beside messages"),
    (asked([], ["a page"], parts=[{"text": "Hi"}]), "documents", "none without messages"),
    (asked([], ["a page"]), "documents", "none without messages"),
    (asked([*TALK, ("user", "Hi")]), "messages", "4"),
    (asked([("user", "x" * 101)]), "messages", "100 bytes"),
    (asked(TALK, ["one", ""]), "documents[1].text", "1 byte"),
    (asked(TALK, ["one", "two", "three"]), "documents", "2"),
    (asked(TALK, ["x" * 101]), "documents", "100 bytes"),
    (asked(TALK, ["x" * 60]), "parts", "100 bytes"),
    (asked([("system", "Hi")], ["one"], cache_salt="x" * 257), "cache_salt", "256 bytes"),
]
"""Requests, and the field and a part of the limit that are told, where little is taken."""


@forms(max_parts=4, max_documents=2, max_prompt_bytes=100)
async def test_what_cannot_be_served_is_refused_by_name(met: HttpWorld, decode: FakeDecode) -> None:
    for request, field, limit in REFUSED:
        refused = await refusal(met, request)
        assert isinstance(refused, InvalidRequest)
        assert refused.field == field
        assert limit in refused.limit
    assert decode.requests == []


async def test_a_chat_counts_as_any_request_and_frees_as_any_does(tmp_path: Path) -> None:
    async with http_world(chat_model(tmp_path / "model"), [FakeDecode("d0", hangs)], max_requests=1) as met:
        call = met.world.stub.Generate(asked(TALK), timeout=WAIT_S)
        await call.read()
        refused = await refusal(met, asked(TALK), num_running=1)
        assert isinstance(refused, Busy)
        assert refused.retry_after_ms > 0
        call.cancel()
        await met.world.idle()
        assert not met.world.node.gateway.num_running


async def test_a_node_that_drains_takes_no_chat(met: HttpWorld, decode: FakeDecode) -> None:
    await met.world.generate(asked(TALK))
    draining = asyncio.create_task(met.world.node.server.drain())
    while met.world.node.server.accepting:  # noqa: ASYNC110 - it is told to nobody in this process
        await asyncio.sleep(0.01)
    with pytest.raises(grpc.RpcError) as caught:
        await met.world.generate(asked(TALK))
    assert isinstance(error_from_rpc(caught.value), Unavailable)
    await draining
    assert len(decode.requests) == 1
