"""Completions over HTTP, through the official client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import FakeDecode
from http_worlds import HttpWorld, events_of, http_world, says, token_of
from tokenizers import pre_tokenizers

from spolia.v1 import common_pb2, decode_pb2


@pytest.fixture
def decode() -> FakeDecode:
    return FakeDecode("d0", says)


@pytest.fixture
async def met(model: Path, decode: FakeDecode) -> AsyncIterator[HttpWorld]:
    async with http_world(model, [decode]) as made:
        yield made


async def test_a_prompt_goes_on_with_the_begin_of_sequence_token_before_it(met: HttpWorld, decode: FakeDecode) -> None:
    answer = await met.openai.completions.create(model="tiny", prompt="hello")
    assert answer.object == "text_completion"
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices] == [(0, "ab!", "length", None)]
    request = decode.requests[0]
    ids = [i for part in request.parts for i in part.token_ids]
    assert ids[0] == 0
    assert request.sampling.max_tokens == 16, "OpenAI's default"
    assert (await met.http.post("/tokenize", json={"prompt": "hello"})).json()["tokens"] == ids
    spelled = (await met.http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True})).json()
    assert "".join(spelled["token_strs"]) == "<s>hello"


async def test_token_ids_are_taken_as_they_are(met: HttpWorld, decode: FakeDecode) -> None:
    await met.openai.completions.create(model="tiny", prompt=[0, 70, 71])
    assert [list(part.token_ids) for part in decode.requests[0].parts] == [[0, 70, 71]]
    answer = await met.http.post("/v1/completions", json={"prompt": [0, 70_000]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(met: HttpWorld, decode: FakeDecode) -> None:
    answer = await met.openai.completions.create(
        model="tiny", prompt=["one", "two"], n=2, extra_headers={"x-request-id": "r"}
    )
    assert [(c.index, c.finish_reason) for c in answer.choices] == [
        (0, "length"),
        (1, "stop"),
        (2, "length"),
        (3, "stop"),
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert sorted(request.request_id for request in decode.requests) == ["r-0", "r-1"]
    texts = dict.fromkeys(range(4), "")
    stream = await met.openai.completions.create(model="tiny", prompt=["one", "two"], n=2, stream=True)
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert set(texts.values()) == {"ab!"}


async def test_documents_stand_before_every_prompt(met: HttpWorld, decode: FakeDecode) -> None:
    extra = {"documents": ["the stones"], "reuse": "linked"}
    await met.openai.completions.create(model="tiny", prompt=["a", "b"], extra_body=extra)
    ids = {next(part.chunk_id for part in request.parts if part.chunk_id) for request in decode.requests}
    assert len(ids) == 1


async def test_logprobs_are_told_in_the_older_form(met: HttpWorld) -> None:
    answer = await met.openai.completions.create(model="tiny", prompt="hello", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "!"]
    assert logprobs.token_logprobs == [-0.5, -0.5, -9999.0]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"x": -1.0, "a": -0.5}, "the token itself is among them"
    offsets: list[int] = []
    async for chunk in await met.openai.completions.create(model="tiny", prompt="hello", logprobs=0, stream=True):
        told = chunk.choices[0].logprobs
        offsets += told.text_offset or [] if told is not None else []
    assert offsets == [0, 1, 2], "places count on from chunk to chunk"


async def test_tokens_inside_a_character_are_named_by_their_bytes(model: Path) -> None:
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("漢")[0][0]
    ids = [token_of(char) for char in spelled]

    async def spells(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        for index, token_id in enumerate(ids):
            delta = common_pb2.TokenDelta(
                token_index=index,
                token_ids=[token_id],
                text="漢" if index == 2 else "",
                logprobs=[common_pb2.TokenLogprobs(logprob=-1.0)],
            )
            yield decode_pb2.DecodeServiceGenerateResponse(delta=delta)
        finish = common_pb2.Finish(reason=common_pb2.FINISH_REASON_STOP, num_generated_tokens=3)
        yield decode_pb2.DecodeServiceGenerateResponse(finish=finish)

    async with http_world(model, [FakeDecode("d0", spells)]) as met:
        answer = await met.openai.completions.create(model="tiny", prompt="x", logprobs=0)
        logprobs = answer.choices[0].logprobs
        assert answer.choices[0].text == "漢"
        assert answer.choices[0].finish_reason == "stop"
        assert logprobs is not None
        assert logprobs.tokens == ["bytes:\\xe6", "bytes:\\xbc", "bytes:\\xa2"]
        assert logprobs.text_offset == [0, 0, 0]


async def test_bad_requests_name_the_field(met: HttpWorld, decode: FakeDecode) -> None:
    for body, param in (
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "documents": [{"text": "d", "title": "t"}]}, "documents[0].title"),
        ({}, "prompt"),
    ):
        answer = await met.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (body, answer.text)
    assert not decode.requests


async def test_one_prompts_failure_ends_the_whole_request(model: Path) -> None:
    async def fails_once(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.request_id.endswith("-1"):
            raise ValueError("broken")
        async for event in says(node, request, context):
            yield event
        await node.ended.wait()

    decode = FakeDecode("d0", fails_once)
    async with http_world(model, [decode], max_attempts=1) as met:
        answer = await met.http.post("/v1/completions", json={"prompt": ["a", "b"]})
        assert answer.status_code == 500
        await decode.ended.wait()
        assert met.world.node.gateway.num_running == 0


async def test_a_stream_of_completions_is_framed_as_events(met: HttpWorld) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    events = events_of((await met.http.post("/v1/completions", json=body)).text)
    assert [event["choices"][0]["text"] for event in events[:-2]] == ["a", "b", "!", ""]
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 3
    assert events[-1] == "[DONE]"


async def test_a_token_nobody_knows_is_told_of_the_prompt(met: HttpWorld, decode: FakeDecode) -> None:
    answer = await met.http.post("/v1/completions", json={"prompt": [0, 4_000_000_000]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "prompt")
    assert error["message"].startswith("prompt ")
    assert "parts" not in error["message"]
    assert not decode.requests
