"""What is to be answered, as the contract states it: parts, or a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spolia.argument_checks import check_not_empty, checked_items, checked_text, checked_uint32, wrong_type
from spolia.parts import ChatMessage, Document, Documents, Parts, TokenIds
from spolia.v1 import gateway_pb2


@dataclass(frozen=True, slots=True)
class Prompt:
    """Parts, or messages and what they are about."""

    parts: Sequence[gateway_pb2.PromptPart] = ()
    messages: Sequence[gateway_pb2.ChatMessage] = ()
    documents: Sequence[gateway_pb2.Document] = ()

    @property
    def large_field(self) -> str:
        """What is to blame where a request is too large."""
        return "messages" if self.messages else "parts"


def prompt_of(parts: Parts) -> Prompt:
    """A prompt made of parts. Raises `InvalidRequest` for what cannot be sent."""
    lone = isinstance(parts, str | Document | TokenIds)
    given = (parts,) if lone else checked_items(parts, "parts", "str, Document, TokenIds or an iterable of them")
    built = [_prompt_part(part, f"parts[{index}]") for index, part in enumerate(given)]
    check_not_empty(built, "parts", "part")
    return Prompt(parts=built)


def chat_of(messages: Iterable[ChatMessage], documents: Documents) -> Prompt:
    """A chat, for the model's template to write. Raises `InvalidRequest` for what cannot be sent."""
    given = enumerate(checked_items(messages, "messages", "an iterable of ChatMessage"))
    built = [_chat_message(message, f"messages[{index}]") for index, message in given]
    check_not_empty(built, "messages", "message")
    about = enumerate(_documents(documents))
    return Prompt(
        messages=built, documents=[document_message(document, f"documents[{index}]") for index, document in about]
    )


def document_list(documents: Documents) -> list[Document]:
    """`documents` as a list; a `str` becomes a document without a name. Raises `InvalidRequest` for none at all."""
    built = _documents(documents)
    check_not_empty(built, "documents", "document")
    return built


def document_message(document: Document, field: str) -> gateway_pb2.Document:
    """One document. Raises `InvalidRequest` for what cannot be sent."""
    text = checked_text(document.text, f"{field}.text")
    check_not_empty(text, f"{field}.text", "character")
    return gateway_pb2.Document(text=text, name=checked_text(document.name, f"{field}.name"))


def _documents(documents: Documents) -> list[Document]:
    lone = isinstance(documents, str | Document)
    given = (documents,) if lone else checked_items(documents, "documents", "str, Document or an iterable of them")
    built = []
    for index, item in enumerate(given):
        if not isinstance(item, str | Document):
            raise wrong_type(item, f"documents[{index}]", "str or Document")
        built.append(Document(item) if isinstance(item, str) else item)
    return built


def _prompt_part(part: object, field: str) -> gateway_pb2.PromptPart:
    match part:
        case str():
            check_not_empty(part, f"{field}.text", "character")
            return gateway_pb2.PromptPart(text=checked_text(part, f"{field}.text"))
        case Document():
            return gateway_pb2.PromptPart(document=document_message(part, f"{field}.document"))
        case TokenIds():
            check_not_empty(part.ids, f"{field}.token_ids", "token")
            ids = [checked_uint32(token_id, f"{field}.token_ids") for token_id in part.ids]
            return gateway_pb2.PromptPart(token_ids=gateway_pb2.TokenIds(ids=ids))
        case _:
            raise wrong_type(part, field, "str, Document or TokenIds")


def _chat_message(message: object, field: str) -> gateway_pb2.ChatMessage:
    if not isinstance(message, ChatMessage):
        raise wrong_type(message, field, "ChatMessage")
    role, content = checked_text(message.role, f"{field}.role"), checked_text(message.content, f"{field}.content")
    return gateway_pb2.ChatMessage(role=role, content=content)
