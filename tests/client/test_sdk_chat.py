"""Laws of chats in the SDK: messages are sent as they are written, and what cannot be sent is refused by name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_gateway import FakeGateway

from spolia import AsyncClient, ChatMessage, Client, Document, InvalidRequest, NotSupported
from spolia.v1 import common_pb2, gateway_pb2

CHAT = [
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Who?"),
    ChatMessage("assistant", ""),
    ChatMessage("user", "And why?"),
]
SENT = [gateway_pb2.ChatMessage(role=message.role, content=message.content) for message in CHAT]


def test_a_chat_is_sent_as_its_messages_and_documents(gateway: FakeGateway) -> None:
    with Client(gateway.address, model="tiny") as client:
        documents = ["A page.", Document("Another.", name="other")]
        answer = client.chat(CHAT, documents, mode="linked", max_tokens=9, request_id="chat-1")
        with client.stream_chat(iter(CHAT)) as stream:
            texts = [delta.text for delta in stream]
    assert answer.text == "".join(texts) == "Héllo"
    first, second = gateway.requests
    assert list(first.messages) == list(second.messages) == SENT
    assert [(document.text, document.name) for document in first.documents] == [("A page.", ""), ("Another.", "other")]
    assert not first.parts
    assert not second.documents
    assert (first.mode, first.sampling.max_tokens) == (common_pb2.REUSE_MODE_LINKED, 9)
    assert (first.model, first.request_id) == ("tiny", "chat-1")


def test_asyncio_sends_the_same(gateway: FakeGateway) -> None:
    async def ask() -> tuple[str, str]:
        async with AsyncClient(gateway.address) as client:
            answer = await client.chat(CHAT, documents="A page.", mode="linked")
            async with client.stream_chat(CHAT, documents=[], mode="linked") as stream:
                return answer.text, "".join([delta.text async for delta in stream])

    assert asyncio.run(ask()) == ("Héllo", "Héllo")
    first, second = gateway.requests
    assert list(first.messages) == list(second.messages) == SENT
    assert [document.text for document in first.documents] == ["A page."]
    assert not second.documents


@pytest.mark.parametrize(
    ("messages", "documents", "field"),
    [
        ([], (), "messages"),
        ("Hi", (), "messages"),
        (CHAT[0], (), "messages"),
        (["Hi"], (), "messages[0]"),
        ([CHAT[0], {"role": "user", "content": "Hi"}], (), "messages[1]"),
        ([ChatMessage(None, "Hi")], (), "messages[0].role"),  # type: ignore[arg-type]  # wrong on purpose
        ([ChatMessage("user", None)], (), "messages[0].content"),  # type: ignore[arg-type]  # wrong on purpose
        ([ChatMessage("user", "caf\ud800")], (), "messages[0].content"),
        ([ChatMessage("user", "x" * 1001)], (), "messages"),
        (CHAT, [5], "documents[0]"),
        (CHAT, ["a", ""], "documents[1].text"),
        (CHAT, {"text": "a"}, "documents"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(
    messages: Any, documents: Any, field: str, gateway: FakeGateway
) -> None:
    with Client(gateway.address, max_message_bytes=1000) as client, pytest.raises(InvalidRequest) as caught:
        client.chat(messages, documents=documents)
    assert caught.value.field == field
    assert caught.value.limit
    assert gateway.requests == []


def test_unknown_options_are_refused_by_the_name_of_the_call(gateway: FakeGateway) -> None:
    given: Any = {"maxtokens": 5}
    with Client(gateway.address) as client:
        with pytest.raises(TypeError, match=r"Client\.chat\(\)"):
            client.chat(CHAT, **given)
        with pytest.raises(TypeError, match=r"Client\.stream_chat\(\)"):
            client.stream_chat(CHAT, **given)
    assert gateway.requests == []


def test_a_model_without_a_template_is_told_from_messages_it_does_not_take(gateway: FakeGateway) -> None:
    gateway.has_template = False
    with Client(gateway.address) as client, pytest.raises(NotSupported) as caught:
        client.chat(CHAT)
    assert caught.value.field == "messages"
