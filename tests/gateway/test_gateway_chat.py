"""RenderChat: a chat becomes the same prompt over gRPC as over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import WAIT_S, FakeDecode
from gateway_worlds import World, world
from http_worlds import chat_model, http_world, says

from spolia.errors import error_from_rpc
from spolia.v1 import gateway_pb2 as pb
from spolia_core.errors import InvalidRequest, NotFound, NotSupported

ASKED = pb.ChatMessage(role="user", content="hello")


async def render(w: World, *messages: pb.ChatMessage, **fields: Any) -> list[pb.PromptPart]:
    request = pb.RenderChatRequest(messages=messages, **fields)
    return list((await w.stub.RenderChat(request, timeout=WAIT_S)).parts)


async def test_the_parts_are_the_prompt_that_http_makes(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    decode = FakeDecode("d0", says)
    async with http_world(chat_model(tmp_path, template), [decode]) as met:
        documents = [pb.Document(text="the stones", name="stones.txt"), pb.Document(text="are cut")]
        parts = await render(met.world, ASKED, documents=documents)
        assert [part.document for part in parts if part.HasField("document")] == [
            documents[0],
            pb.Document(text="are cut", name="documents[1]"),
        ]
        request = pb.GenerateRequest(parts=parts, no_bos=True)
        async for _ in met.world.stub.Generate(request, timeout=WAIT_S):
            pass
        await met.openai.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            extra_body={"documents": ["the stones", "are cut"]},
        )
        over_grpc, over_http = ([token for part in each.parts for token in part.token_ids] for each in decode.requests)
        assert over_grpc == over_http


async def test_a_chat_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'bishop' %}{{ raise_exception('no bishops') }}{% endif %}{{ messages[0].content }}"
    )
    async with world(chat_model(tmp_path / "with", template), max_prompt_bytes=1000) as w:
        for messages, fields, kind, field in (
            ([], {}, InvalidRequest, "messages"),
            ([pb.ChatMessage(role="bishop", content="x")], {}, InvalidRequest, "messages"),
            ([ASKED], {"documents": [pb.Document()]}, InvalidRequest, "documents[0].text"),
            ([ASKED], {"model": "other"}, NotFound, "model"),
            ([pb.ChatMessage(role="user", content="x" * 1001)], {}, InvalidRequest, "messages"),
        ):
            assert await refusal(w, messages, fields) == (kind, field)
    async with world(chat_model(tmp_path / "without", None)) as w:
        assert await refusal(w, [ASKED], {}) == (NotSupported, "messages")


async def refusal(w: World, messages: list[pb.ChatMessage], fields: dict[str, Any]) -> tuple[type, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await render(w, *messages, **fields)
    error = error_from_rpc(caught.value)
    return type(error), error.field
