"""The JSON of chats that may call tools."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Any

from spolia.v1 import common_pb2
from spolia_core.tool_calls import (
    CallArguments,
    CallBegins,
    CallEvent,
    Content,
    ToolCall,
    ToolCallParser,
    parse_tool_calls,
)
from spolia_gateway.http.gathered import Sample
from spolia_gateway.http.logprob_tokens import Token
from spolia_gateway.http.shapes import ChatShape, finish_reason
from spolia_gateway.token_texts import TokenTexts

_ID_CHARS = string.ascii_letters + string.digits
_ID_LENGTH = 9
"""What Mistral's templates demand of ids, and no others mind: answers become messages of the next request."""


class ToolShape(ChatShape):
    """Chat completions whose text is read for calls."""

    def __init__(self, texts: TokenTexts, num_choices: int, *, only_calls: bool, has_logprobs: bool) -> None:
        """`only_calls`: answers are held to calls, and have no text."""
        super().__init__(texts, has_logprobs=has_logprobs)
        self._only_calls = only_calls
        self._parsers = [ToolCallParser(only_calls=only_calls) for _ in range(num_choices)]

    def opening(self, choice: int) -> dict[str, Any] | None:
        """Says who speaks; whether there will be text is not known."""
        return self._chunk(choice, {"role": "assistant", "content": None})

    def piece(self, choice: int, text: str, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """What the text settles, and all tokens, those of calls too."""
        delta = _delta(self._parsers[choice].feed(text))
        return self._chunk(choice, delta, self._logprobs(tokens)) if delta or tokens else None

    def ending(self, choice: int, reason: int) -> dict[str, Any]:
        """Says why it ended, and what was held back: text that might have begun a call, or a call that hardly began."""
        parser = self._parsers[choice]
        delta = _delta(parser.finish(was_cut=_was_cut(reason)))
        return self._chunk(choice, delta) | {"finish_reason": _finish_reason(reason, parser.num_calls)}

    def whole(self, choice: int, sample: Sample) -> dict[str, Any]:
        """The message."""
        answer = parse_tool_calls(sample.text, only_calls=self._only_calls, was_cut=_was_cut(sample.reason))
        told = super().whole(choice, sample) | {"finish_reason": _finish_reason(sample.reason, len(answer.calls))}
        told["message"]["content"] = answer.content or None
        if answer.calls:
            told["message"]["tool_calls"] = [_call(call) for call in answer.calls]
        return told


def _was_cut(reason: int) -> bool:
    """Whether it may have ended inside a call: by `max_tokens`, a stop string, or what this release does not know."""
    return reason != common_pb2.FINISH_REASON_EOS


def _finish_reason(reason: int, num_calls: int) -> str:
    """That calls are whole, where they are; else what cut the last."""
    return "tool_calls" if num_calls and not _was_cut(reason) else finish_reason(reason)


def _delta(events: Sequence[CallEvent]) -> dict[str, Any]:
    """Events as one delta: text, and by its index what is new of each call. Empty where nothing is."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case Content():
                delta["content"] = delta.get("content", "") + event.text
            case CallBegins():
                calls[event.index] = {"index": event.index} | _call(ToolCall(event.name, ""))
            case CallArguments():
                call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
    return delta | {"tool_calls": list(calls.values())} if calls else delta


def _call(call: ToolCall) -> dict[str, Any]:
    call_id = "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
