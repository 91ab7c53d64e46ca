"""The JSON of answers: whole, and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from spolia.v1 import common_pb2
from spolia_gateway.http.gathered import Sample
from spolia_gateway.http.logprob_tokens import CompletionLogprobs, Token, chat_logprobs
from spolia_gateway.token_texts import TokenTexts

_REASONS: dict[int, str] = {
    common_pb2.FINISH_REASON_EOS: "stop",
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}


def finish_reason(reason: int) -> str:
    """OpenAI's word. A newer node may end for what this release does not know, which ends the text all the same."""
    return _REASONS.get(reason, "stop")


class Shape(Protocol):
    """How one kind of answer looks. Choices are numbered over all prompts."""

    object: str
    chunk_object: str
    id_prefix: str

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk's choice, before any text; None where there is none."""

    def piece(self, choice: int, text: str, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """A chunk's choice; None where there is nothing to tell yet."""

    def ending(self, choice: int, reason: int) -> dict[str, Any]:
        """The last chunk's choice."""

    def whole(self, choice: int, sample: Sample) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""


class ChatShape:
    """Chat completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, texts: TokenTexts, *, has_logprobs: bool) -> None:
        self._texts = texts
        self._has_logprobs = has_logprobs

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Says who speaks."""
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def piece(self, choice: int, text: str, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """New text."""
        return self._chunk(choice, {"content": text}, self._logprobs(tokens))

    def ending(self, choice: int, reason: int) -> dict[str, Any]:
        """Says why it ended."""
        return self._chunk(choice, {}) | {"finish_reason": finish_reason(reason)}

    def whole(self, choice: int, sample: Sample) -> dict[str, Any]:
        """The message."""
        return {
            "index": choice,
            "message": {"role": "assistant", "content": sample.text, "refusal": None},
            "logprobs": self._logprobs(sample.tokens),
            "finish_reason": finish_reason(sample.reason),
        }

    def _chunk(self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self._texts) if self._has_logprobs else None


class CompletionShape:
    """Text completions."""

    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, texts: TokenTexts, num_choices: int, *, has_logprobs: bool) -> None:
        self._logprobs = [CompletionLogprobs(texts) for _ in range(num_choices)] if has_logprobs else []

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Nothing: text is all there is."""
        return None

    def piece(self, choice: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """New text."""
        logprobs = self._logprobs[choice].take(tokens) if self._logprobs else None
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, choice: int, reason: int) -> dict[str, Any]:
        """Says why it ended."""
        return {"index": choice, "text": "", "logprobs": None, "finish_reason": finish_reason(reason)}

    def whole(self, choice: int, sample: Sample) -> dict[str, Any]:
        """The text."""
        return self.piece(choice, sample.text, sample.tokens) | {"finish_reason": finish_reason(sample.reason)}


class Envelope:
    """What every chunk of an answer has around its choices."""

    def __init__(self, shape: Shape, request_id: str, model: str) -> None:
        self._common = {"id": shape.id_prefix + request_id, "created": int(time.time()), "model": model}
        self._object, self._chunk_object = shape.object, shape.chunk_object

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer that is not streamed."""
        return self._common | {"object": self._object, "choices": choices, "usage": usage}

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream."""
        return self.around_choices() | {"choices": choices}

    def around_choices(self) -> dict[str, Any]:
        """What is the same in every chunk."""
        return self._common | {"object": self._chunk_object}
