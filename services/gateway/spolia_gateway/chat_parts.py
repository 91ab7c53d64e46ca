"""A chat as prompt parts: what the template writes around the documents, and each document by itself."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_gateway import tool_turns
from spolia_gateway.chat_template import ChatTemplate

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ReusableText:
    """A document of a chat. `title` is for templates that print one; `name` is not printed, and told in errors."""

    text: str
    title: str | None = None
    name: str = ""


def chat_parts(
    template: ChatTemplate,
    messages: Messages,
    documents: Sequence[ReusableText] = (),
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[gateway_pb2.PromptPart]:
    """The prompt of a chat. Documents stand where the template puts its `documents`; where it puts none, before the
    first user message's text, in their order and with nothing between them. A template that knows no tools gets them,
    and calls and their results, in the text of turns.

    Raises `InvalidRequest` or `NotSupported`, naming the field, where the template refuses something or a document
    has no place.
    """
    marks = _Marks(len(documents))
    if template.knows_tools(tools):
        render = partial(template.render, tools=tools, variables=variables)
        return marks.cut(_rendered(render, messages, documents, marks), documents)
    messages, words = tool_turns.in_text(messages), ""
    if tools:
        words = tool_turns.words_for(tools)
        messages = tool_turns.with_system_words(messages, words)
    rendered = _rendered(partial(template.render, variables=variables), messages, documents, marks)
    if words not in rendered:
        raise NotSupported(
            "the model's chat template knows no tools, and leaves out the system turn that tells them", field="tools"
        )
    return marks.cut(rendered, documents)


def _rendered(render: Callable[..., str], messages: Messages, documents: Sequence[ReusableText], marks: _Marks) -> str:
    """The prompt's text, marks for documents. Raises as `chat_parts` says."""
    if not documents:
        return render(messages)
    named = [_as_template_knows(mark, document) for mark, document in zip(marks.texts, documents, strict=True)]
    rendered = render(messages, documents=named)
    missing = marks.missing_in(rendered)
    if len(missing) == len(documents):
        _check_untitled(documents)
        rendered = render(_before_first_question(messages, marks))
        missing = marks.missing_in(rendered)
    else:
        _check_titles(partial(render, messages), named)
    if missing:
        raise NotSupported(
            f"the model's chat template leaves out documents[{missing[0]}]", field="documents", actual=str(missing[0])
        )
    return rendered


class _Marks:
    """Words that stand for documents while a template is rendered, drawn anew each time: no message can hold one.

    A document's own text never passes through the template, so that it is tokenized alone, the same everywhere.
    """

    def __init__(self, num_documents: int) -> None:
        self._stem = f"DOC{secrets.token_hex(16)}N"
        self.texts = [f"{self._stem}{index}E" for index in range(num_documents)]

    def missing_in(self, rendered: str) -> list[int]:
        """Indices of documents that have no place in it."""
        return [index for index, text in enumerate(self.texts) if text not in rendered]

    def cut(self, rendered: str, documents: Sequence[ReusableText]) -> list[gateway_pb2.PromptPart]:
        """The parts, empty texts left out."""
        if not documents:  # a pattern of its own for every chat takes 0.2 ms to compile
            return [gateway_pb2.PromptPart(text=rendered)] if rendered else []
        pieces = re.split(f"{self._stem}([0-9]+)E", rendered)
        parts: list[gateway_pb2.PromptPart] = []
        for at, piece in enumerate(pieces):
            if at % 2:
                document = documents[int(piece)]
                named = gateway_pb2.Document(
                    text=document.text, name=document.name or document.title or f"documents[{piece}]"
                )
                parts.append(gateway_pb2.PromptPart(document=named))
            elif piece:
                parts.append(gateway_pb2.PromptPart(text=piece))
        return parts


def _as_template_knows(mark: str, document: ReusableText) -> dict[str, str]:
    return {"text": mark} if document.title is None else {"title": document.title, "text": mark}


def _check_untitled(documents: Sequence[ReusableText]) -> None:
    for index, document in enumerate(documents):
        if document.title is not None:
            raise NotSupported(
                f"documents[{index}].title has no place: the model's chat template prints no documents, so their texts "
                "go before the first user message",
                field=f"documents[{index}].title",
                actual=document.title,
            )


def _check_titles(render: Callable[..., str], named: Sequence[Mapping[str, str]]) -> None:
    """Raises `NotSupported` where the template leaves a title out. A title may be any word of the chat, so words that
    no message can hold take the titles' places in a rendering of its own; templates may change their case.
    """
    stem = secrets.token_hex(16)
    marks = {index: f"{stem}t{index}e" for index, document in enumerate(named) if "title" in document}
    if not marks:
        return
    marked = [{**each, "title": marks[index]} if index in marks else each for index, each in enumerate(named)]
    rendered = render(documents=marked).lower()
    for index, mark in marks.items():
        if mark not in rendered:
            field = f"documents[{index}].title"
            raise NotSupported(
                f"{field} has no place: the model's chat template prints documents without their titles",
                field=field,
                actual=named[index]["title"],
            )


def _before_first_question(messages: Messages, marks: _Marks) -> list[Mapping[str, Any]]:
    changed = list(messages)
    for index, message in enumerate(changed):
        if message.get("role") == "user":
            changed[index] = {**message, "content": "".join(marks.texts) + str(message.get("content") or "")}
            return changed
    raise InvalidRequest(
        "documents have no place: there is no user message before which they could stand",
        field="documents",
        limit="a chat with a user message",
    )
