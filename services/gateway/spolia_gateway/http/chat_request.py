"""The body of /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from spolia.constraint_message import set_constraint
from spolia.v1 import common_pb2
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.tools import ToolChoice, ToolMode, read_tool_choice
from spolia_gateway.http.fields import MAX_UINT32, GenerationFields, Strict, TopLogprobs
from spolia_gateway.http.messages import Message


class FunctionTool(Strict):
    """A function the model may call."""

    type: Literal["function"]
    function: dict[str, Any]


def told_of(tools: Sequence[FunctionTool] | None) -> list[dict[str, Any]]:
    """The tools as templates take them."""
    return [tool.model_dump() for tool in tools or ()]


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

    def check(self) -> None:
        """Raises `InvalidRequest` for a schema that is asked for and not given."""
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            field = "response_format.json_schema.schema"
            raise InvalidRequest(f"{field} is missing", field=field, limit="a JSON schema")

    def check_beside_tools(self) -> None:
        """Raises `NotSupported` for a form: an answer that may call tools has theirs."""
        if self.type != "text":
            raise NotSupported(
                f"response_format {self.type} is served where no tool may be called; tool_choice none says so",
                field="response_format",
                limit="text",
                actual=self.type,
            )

    def constrain(self, params: common_pb2.SamplingParams) -> None:
        """Has answers match it."""
        if self.type == "json_object":
            params.json_object.SetInParent()
        elif self.json_schema is not None and self.json_schema.schema_ is not None:
            params.json_schema = json.dumps(self.json_schema.schema_)


class ChatRequest(GenerationFields):
    """A chat, and how to answer it."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_UINT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
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
        if self.response_format is not None:
            self.response_format.check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs true", field="top_logprobs", limit="logprobs true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; give one",
                field="max_completion_tokens",
                limit=str(self.max_tokens),
                actual=str(self.max_completion_tokens),
            )

    def to_tool_choice(self) -> ToolChoice:
        """Whether answers call tools. Raises `InvalidRequest` naming the field, `tools[2].function.name` for example;
        `NotSupported` where a form is asked for too.
        """
        choice = read_tool_choice(told_of(self.tools), self.tool_choice, parallel=self.parallel_tool_calls is not False)
        if choice.mode is not ToolMode.NONE and self.response_format is not None:
            self.response_format.check_beside_tools()
        return choice

    def to_sampling(self, choice: ToolChoice) -> common_pb2.SamplingParams:
        """How tokens are drawn, `choice` as `to_tool_choice` gives it. Raises `InvalidRequest` for tools too large
        together.
        """
        params = self.sampling(num_top_logprobs=(self.top_logprobs or 0) if self.logprobs else None)
        max_tokens = self.max_completion_tokens or self.max_tokens
        if max_tokens is not None:
            params.max_tokens = max_tokens
        if self.response_format is not None:
            self.response_format.constrain(params)
        set_constraint(params, choice.constraint)
        return params
