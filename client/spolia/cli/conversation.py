"""A conversation as a prompt: by the model's own chat template, or as plain text under labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spolia.client import Client
from spolia.options import GenerateOptions
from spolia.parts import ChatMessage, Document, Part, TokenIds
from spolia.results import Result
from spolia.stream import Stream
from spolia_core.reuse import FinishReason


@dataclass(frozen=True, slots=True)
class Turn:
    """A question that was answered. `said` is the answer as a part of a prompt."""

    question: str
    answer: str
    said: Part


@dataclass(slots=True)
class Conversation:
    """What was said so far, about which documents."""

    documents: list[Document]
    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def answered(self, question: str, result: Result) -> None:
        """A turn is complete."""
        self.turns.append(Turn(question, result.text, _said(result)))

    def reset(self) -> None:
        """Forgets the turns, not the documents."""
        self.turns.clear()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to ask, and what ends the answer beside the end of sequence."""

    parts: Sequence[Part]
    stop: tuple[str, ...] = ()


class Writing(Protocol):
    """A way to write conversations as prompts. Changes none."""

    def ask(self, client: Client, conversation: Conversation, question: str, options: GenerateOptions) -> Stream:
        """Asks for the answer to one more question."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """Documents, then questions and answers under labels. An answer goes into the next prompt as the token ids it was
    drawn as, so that the KV of the conversation so far is found again; what ended it is left out.
    """

    user_label: str
    assistant_label: str

    def ask(self, client: Client, conversation: Conversation, question: str, options: GenerateOptions) -> Stream:
        """See `Writing`."""
        prompt = self.prompt(conversation, question)
        asked: GenerateOptions = {**options, "stop": prompt.stop}
        return client.stream(prompt.parts, **asked)

    def prompt(self, conversation: Conversation, question: str) -> Prompt:
        """The conversation with one more question. A model that goes on writes the next question itself, so its label
        ends the answer.
        """
        beginning: list[Part] = [conversation.system] if conversation.system else []
        turns = [part for turn in conversation.turns for part in (self._asked(turn.question), turn.said)]
        parts = [*beginning, *conversation.documents, *turns, self._asked(question)]
        return Prompt(parts, stop=(f"\n{self.user_label}",))

    def _asked(self, question: str) -> str:
        return f"\n{self.user_label} {question}\n{self.assistant_label}"


@dataclass(frozen=True, slots=True)
class Template:
    """The model's own chat template, which the gateway has."""

    def ask(self, client: Client, conversation: Conversation, question: str, options: GenerateOptions) -> Stream:
        """See `Writing`. Before anything is read of it the answer of a model without a template ends with
        `NotSupported`, field "messages".
        """
        messages = [ChatMessage("system", conversation.system)] if conversation.system else []
        for turn in conversation.turns:
            messages += [ChatMessage("user", turn.question), ChatMessage("assistant", turn.answer)]
        messages.append(ChatMessage("user", question))
        return client.stream_chat(messages, conversation.documents, **options)


def _said(result: Result) -> Part:
    """The answer without what ended it: an end-of-sequence token, or the stop string, whose tokens may hold more."""
    token_ids = result.token_ids
    if result.finish_reason is FinishReason.EOS:
        token_ids = token_ids[:-1]
    if result.finish_reason is FinishReason.STOP or not token_ids:
        return result.text or " "
    return TokenIds(token_ids)
