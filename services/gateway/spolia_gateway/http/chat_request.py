"""The body of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from spolia.v1 import common_pb2
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_gateway.http.fields import MAX_UINT32, GenerationFields, Strict, TopLogprobs


class ContentPart(BaseModel):
    """A piece of a message. Text is what is served; pieces of other types are refused by name."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class Message(BaseModel):
    """A turn of a chat. What it holds besides goes to the template, which may know it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class FunctionTool(Strict):
    """A function the model may call."""

    type: Literal["function"]
    function: dict[str, Any]


class JsonSchema(Strict):
    """The schema an answer must fit."""

    name: str
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What form an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(GenerationFields):
    """A chat, and how to answer it."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_UINT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        """Raises `InvalidRequest` for fields that do not go together."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs true", field="top_logprobs", limit="logprobs true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one",
                field="max_completion_tokens",
                limit=str(self.max_tokens),
                actual=str(self.max_completion_tokens),
            )

    def to_sampling(self) -> common_pb2.SamplingParams:
        """How tokens are drawn."""
        params = self.sampling(num_top_logprobs=(self.top_logprobs or 0) if self.logprobs else None)
        max_tokens = self.max_completion_tokens or self.max_tokens
        if max_tokens is not None:
            params.max_tokens = max_tokens
        return params


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as templates take them. Raises `NotSupported` for content that is no text."""
    return [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _turn(message: Message, field: str) -> dict[str, Any]:
    """Templates written for text take content as one string, and know the developer by the older name."""
    turn = message.model_dump(exclude_none=True)
    turn["content"] = _text(message.content, field)
    if message.role == "developer":
        turn["role"] = "system"
    return turn


def _text(content: str | list[ContentPart] | None, field: str) -> str:
    if not isinstance(content, list):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text":
            raise NotSupported(
                f"{field}.content[{index}] is {part.type!r}; this server takes text",
                field=f"{field}.content[{index}].type",
                limit="text",
                actual=part.type,
            )
    return "\n".join(part.text or "" for part in content)
