"""Chat over HTTP, through the official client; what is asserted is on the objects it parsed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_fakes import FakeDecode
from http_worlds import HttpWorld, chat_model, events_of, http_world, says, token_of

from spolia.v1 import common_pb2
from spolia_core.errors import Busy, InternalError, NotSupported, SpoliaError, Unavailable
from spolia_gateway.caller import Caller

CHAT: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chatty"))


@pytest.fixture
def decode() -> FakeDecode:
    return FakeDecode("d0", says)


@pytest.fixture
async def met(chatty: Path, decode: FakeDecode) -> AsyncIterator[HttpWorld]:
    async with http_world(chatty, [decode]) as made:
        yield made


async def test_an_answer_has_its_text_its_reason_and_its_usage(met: HttpWorld, decode: FakeDecode) -> None:
    answer = await met.openai.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0.5, top_p=0.9, seed=7, stop=["\n", "##"], max_completion_tokens=9
    )
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "ab!", "length")
    assert choice.logprobs is None
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    num_prompt = sum(len(part.token_ids) for part in decode.requests[0].parts)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (num_prompt, 3, num_prompt + 3)
    assert usage.prompt_tokens_details.cached_tokens == 4
    report = usage.model_extra["spolia"] if usage.model_extra else {}
    assert report["mode"] == "exact"
    assert report["sources"] == {"computed": num_prompt - 5, "link": 1, "device": 2, "disk": 2}
    assert report["misses"] == [{"kind": "local", "reason": "store_late", "num_chunks": 1, "num_tokens": 7}]
    assert report["seed"] == 7
    sampling = decode.requests[0].sampling
    assert (sampling.temperature, round(sampling.top_p, 6), sampling.seed) == (0.5, 0.9, 7)
    assert (list(sampling.stop), sampling.max_tokens, sampling.num_samples) == (["\n", "##"], 9, 1)


async def test_defaults_are_those_of_openai_and_the_template_begins_the_prompt(
    met: HttpWorld, decode: FakeDecode
) -> None:
    await met.openai.chat.completions.create(model="tiny", messages=CHAT)
    request = decode.requests[0]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.num_samples) == (1.0, 1.0, 1)
    assert request.mode == common_pb2.REUSE_MODE_EXACT
    ids = [i for part in request.parts for i in part.token_ids]
    assert ids[:2] == [0, 2], "the template's <s> and [user] are those tokens, and no other <s> is put before them"
    tokenized = await met.http.post("/tokenize", json={"messages": CHAT})
    assert tokenized.json() == {"tokens": ids, "count": len(ids), "max_model_len": 256}


async def test_a_stream_says_what_the_whole_answer_says(met: HttpWorld) -> None:
    stream = await met.openai.chat.completions.create(
        model="tiny", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None, None]
    assert "".join(delta.content or "" for delta in deltas) == "ab!"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 5
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 3


async def test_a_stream_is_framed_as_events(met: HttpWorld) -> None:
    body = {"messages": CHAT, "stream": True}
    answer = await met.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    assert all("usage" not in event for event in events[:-1]), "nobody asked for usage"
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}


async def test_samples_come_under_their_indices(met: HttpWorld, decode: FakeDecode) -> None:
    answer = await met.openai.chat.completions.create(model="tiny", messages=CHAT, n=2)
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "ab!", "length"),
        (1, "ab!", "stop"),
    ]
    assert decode.requests[0].sampling.num_samples == 2
    texts, reasons = {0: "", 1: ""}, {}
    async for chunk in await met.openai.chat.completions.create(model="tiny", messages=CHAT, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "ab!", 1: "ab!"}
    assert reasons == {0: "length", 1: "stop"}


async def test_logprobs_tell_every_token_and_the_likeliest(met: HttpWorld) -> None:
    answer = await met.openai.chat.completions.create(model="tiny", messages=CHAT, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(t.token, t.bytes, t.logprob) for t in logprobs.content] == [
        ("a", [97], -0.5),
        ("b", [98], -0.5),
        ("!", [33], -9999.0),
    ]
    assert [(top.token, top.logprob) for top in logprobs.content[0].top_logprobs] == [("x", -1.0), ("y", -2.0)]
    streamed = []
    async for chunk in await met.openai.chat.completions.create(
        model="tiny", messages=CHAT, logprobs=True, stream=True
    ):
        told = chunk.choices[0].logprobs
        streamed += told.content or [] if told is not None else []
    assert [token.token for token in streamed] == ["a", "b", "!"]
    assert all(token.top_logprobs == [] for token in streamed)


async def test_documents_are_parts_of_their_own_wherever_the_template_puts_them(
    met: HttpWorld, decode: FakeDecode
) -> None:
    documents = [{"text": "the stones </s>", "title": "T"}, "are cut"]
    extra = {"documents": documents, "reuse": "linked", "chat_template_kwargs": {"mood": "kind"}}
    answer = await met.openai.chat.completions.create(model="tiny", messages=CHAT, extra_body=extra)
    request = decode.requests[0]
    assert request.mode == common_pb2.REUSE_MODE_LINKED
    chunks = [part for part in request.parts if part.chunk_id]
    assert len(chunks) == 2
    assert 1 not in chunks[0].token_ids, "a document's </s> is text"
    alone = await met.http.post("/tokenize", json={"prompt": "are cut", "add_special_tokens": False})
    assert list(chunks[1].token_ids) == alone.json()["tokens"]
    assert token_of("k") in request.parts[-1].token_ids, "the template's own variable"
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["spolia"]["mode"] == "linked"


async def test_another_salt_gives_other_ids_and_is_carried_to_the_node(met: HttpWorld, decode: FakeDecode) -> None:
    for salt in (None, "a", "b", "a"):
        extra = {"documents": ["the stones"], "reuse": "linked", "cache_salt": salt}
        await met.openai.chat.completions.create(model="tiny", messages=CHAT, extra_body=extra)
    ids = [next(part.chunk_id for part in request.parts if part.chunk_id) for request in decode.requests]
    assert len(set(ids)) == 3
    assert ids[1] == ids[3]
    assert [request.cache_salt for request in decode.requests] == ["", "a", "b", "a"]


async def test_a_request_id_travels_in_and_out(met: HttpWorld, decode: FakeDecode) -> None:
    answer = await met.openai.chat.completions.create(
        model="tiny", messages=CHAT, extra_headers={"x-request-id": "mine-1"}
    )
    assert answer._request_id == "mine-1"
    assert answer.id == "chatcmpl-mine-1"
    assert decode.requests[0].request_id == "mine-1"


BAD: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"temperature": -0.1}, 400, "temperature", None),
    ({"temperature": "warm"}, 400, "temperature", None),
    ({"top_p": 0}, 400, "top_p", None),
    ({"n": 65}, 400, "n", None),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_completion_tokens", None),
    ({"stop": ["x"] * 17}, 400, "stop", None),
    ({"stop": [""]}, 400, "stop", None),
    ({"seed": 1.5}, 400, "seed", None),
    ({"top_logprobs": 2}, 400, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ({"messages": []}, 400, "messages", None),
    ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0].type",
        "not_supported",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text", None),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, 400, "messages[0].content[0].type", None),
    ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "messages", "context_length_exceeded"),
    ({"max_tokens": 256}, 400, "max_tokens", "context_length_exceeded"),
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"model": ""}, 400, "model", None),
    ({"reuse": "prefix"}, 400, "reuse", None),
    ({"documents": [""]}, 400, "documents[0]", None),
    ({"documents": ["x", {"text": "x", "id": 1}]}, 400, "documents[1].id", "unrecognised_field"),
    ({"documents": [{"title": "x"}]}, 400, "documents[0].text", None),
    ({"documents": [5]}, 400, "documents[0]", None),
    ({"stop": ["x", 5]}, 400, "stop[1]", None),
    ({"tool_choice": "some"}, 400, "tool_choice", None),
    ({"documents": ["x"] * 4097}, 400, "documents", None),
    ({"cache_salt": "x" * 257}, 400, "cache_salt", None),
    ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs.messages", None),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema.schema", None),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, 400, "ignore_eos", None),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", None),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not_supported"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "not_supported"),
    ({"unheard_of": 1}, 400, "unheard_of", "unrecognised_field"),
    ({"un-heard of": 1}, 400, "un-heard of", "unrecognised_field"),
    ({"documents": [{"text": "x", "Id": 1}]}, 400, "documents[0].Id", "unrecognised_field"),
]


async def test_bad_requests_name_the_field_before_any_node_is_asked(met: HttpWorld, decode: FakeDecode) -> None:
    for change, status, param, code in BAD:
        answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT} | change)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code), (change, error)
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    assert not decode.requests
    assert met.world.node.gateway.num_running == 0


async def test_a_response_format_is_carried_to_the_node(met: HttpWorld, decode: FakeDecode) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    for given in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}):
        ask: Any = met.openai.chat.completions.create  # whose types allow no wrong form
        await ask(model="tiny", messages=CHAT, response_format=given)
    constraints = [request.sampling for request in decode.requests]
    assert constraints[0].WhichOneof("constraint") == "json_object"
    assert json.loads(constraints[1].json_schema) == schema


async def test_what_a_node_refuses_is_told_in_the_fields_of_the_body(chatty: Path) -> None:
    field = "sampling.json_schema"
    error: SpoliaError = NotSupported(f"{field} cannot be enforced: Unimplemented keys", field=field)

    async def refuses(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        raise error
        yield

    async with http_world(chatty, [FakeDecode("d0", refuses)]) as met:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"uniqueItems": True}}}
        answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT, "response_format": form})
        told = answer.json()["error"]
        assert (answer.status_code, told["code"]) == (400, "not_supported")
        assert told["param"] == "response_format.json_schema.schema"
        assert "response_format.json_schema.schema cannot be enforced: " in told["message"]
        assert "sampling" not in told["message"]


async def test_neutral_values_of_what_is_not_served_are_taken(met: HttpWorld) -> None:
    neutral: dict[str, Any] = {
        "frequency_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "user": "u",
        "metadata": {"k": "v"},
        "store": False,
    }
    history = [*CHAT, {"role": "assistant", "content": "hi", "refusal": None}, {"role": "developer", "content": "x"}]
    answer = await met.http.post("/v1/chat/completions", json={"messages": history} | neutral)
    assert answer.status_code == 200, answer.text


async def test_a_model_without_a_template_says_so(tmp_path: Path, decode: FakeDecode) -> None:
    async with http_world(chat_model(tmp_path, None), [decode]) as met:
        with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
            await met.openai.chat.completions.create(model="tiny", messages=CHAT)
        assert caught.value.param == "messages"
        answer = await met.openai.completions.create(model="tiny", prompt="hello")
        assert answer.choices[0].text == "ab!"


async def test_a_full_cluster_says_when_to_come_back(chatty: Path) -> None:
    async def busy(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        raise Busy("no room", field="max_waiting", retry_after_ms=1500)
        yield

    async with http_world(chatty, [FakeDecode("d0", busy)], max_attempts=1) as met:
        for streams in (False, True):
            answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT, "stream": streams})
            assert answer.status_code == 429
            assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")
            error = answer.json()["error"]
            assert (error["type"], error["param"]) == ("rate_limit_error", None), "the field is the node's"
        with pytest.raises(openai.RateLimitError):
            await met.openai.chat.completions.create(model="tiny", messages=CHAT)


async def test_a_gateway_at_its_limit_says_so(chatty: Path) -> None:
    async with http_world(chatty, [FakeDecode("d0", says)], max_requests=1) as met:
        with met.world.node.gateway._running(Caller("default")):
            answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert (await met.http.post("/v1/chat/completions", json={"messages": CHAT})).status_code == 200


async def test_a_cluster_without_its_model_is_unavailable(chatty: Path) -> None:
    async with http_world(chatty, []) as met:
        assert (await met.http.get("/health")).status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            await met.openai.chat.completions.create(model="tiny", messages=CHAT)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        assert (await met.openai.models.list()).data == []


async def test_an_error_after_the_first_token_is_the_streams_last_event(chatty: Path) -> None:
    async def breaks(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in says(node, request, context):
            yield event
            raise InternalError("a rule broke")

    async with http_world(chatty, [FakeDecode("d0", breaks)], max_attempts=1) as met:
        stream = await met.openai.chat.completions.create(model="tiny", messages=CHAT, stream=True)
        with pytest.raises(openai.APIError, match="failed on node d0, whose log says why"):
            async for _ in stream:
                pass
        answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT, "stream": True})
        assert answer.status_code == 200
        assert events_of(answer.text)[-1]["error"]["code"] == "internal_error"
        assert "[DONE]" not in answer.text


async def test_a_late_answer_is_a_timeout_and_an_unavailable_node_a_503(chatty: Path) -> None:
    async def gone(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        raise Unavailable("away")
        yield

    async with http_world(chatty, [FakeDecode("d0", gone)], max_attempts=1) as met:
        answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"

    async def late(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        await node.ended.wait()
        yield

    async with http_world(chatty, [FakeDecode("d0", late)], default_timeout_s=0.2) as met:
        answer = await met.http.post("/v1/chat/completions", json={"messages": CHAT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
