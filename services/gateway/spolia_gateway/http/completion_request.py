"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from spolia.v1 import common_pb2
from spolia_core.errors import InvalidRequest
from spolia_gateway.http.fields import MAX_UINT32, GenerationFields, TopLogprobs

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions default to."""
MAX_PROMPTS = 64

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_UINT32)]], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """Text, or token ids, to go on from; or several, each for itself."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: TopLogprobs | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def num_samples(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def check(self) -> None:
        """Raises `InvalidRequest` for fields that do not go together."""
        super().check()
        for index, document in enumerate(self.reusable):
            if document.title is not None:
                raise InvalidRequest(
                    f"documents[{index}].title has no place: completions have no template that prints one",
                    field=f"documents[{index}].title",
                    actual=document.title,
                )

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, without the documents that go before every one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def to_sampling(self) -> common_pb2.SamplingParams:
        """How tokens are drawn."""
        params = self.sampling(num_top_logprobs=self.logprobs)
        params.max_tokens = self.max_tokens or DEFAULT_COMPLETION_TOKENS
        return params
