"""Fields that chat and completions have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.sampling import MAX_SAMPLES, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from spolia_gateway.chat_parts import ReusableText

MAX_UINT32 = 2**32 - 1
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
ModelName = Annotated[str, Field(min_length=1)]
"""May be left out, but who names a model has one in mind."""
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
MODES = {"exact": common_pb2.REUSE_MODE_EXACT, "linked": common_pb2.REUSE_MODE_LINKED}


MAX_FIELDS = 64
"""More than any object here knows."""


class Strict(BaseModel):
    """A body that takes no field it does not know, and no value of another type.

    Lists in it stop at the first value that is wrong, `fail_fast`: one is told, and each takes as long as a hundred
    that are right.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """For the same reason, of many fields that nobody knows one is left."""
        if not isinstance(value, dict) or len(value) <= MAX_FIELDS:
            return value
        names = {known.alias or name for name, known in cls.model_fields.items()}
        unknown = next(name for name in value if name not in names)
        return {name: value[name] for name in value if name in names or name is unknown}


class DocumentText(Strict):
    """A document to reuse."""

    text: Annotated[str, Field(min_length=1)]
    title: str | None = None


class StreamOptions(Strict):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def reusable_texts(documents: Sequence[str | DocumentText] | None) -> list[ReusableText]:
    """Documents, however they are written."""
    given = documents or ()
    return [ReusableText(d) if isinstance(d, str) else ReusableText(d.text, d.title) for d in given]


class GenerationFields(Strict):
    """What both kinds of request may ask for. The last group is Spolia's own; docs/http.md has them all."""

    model: ModelName = ""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_UINT32)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Served at these values only.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    # For the books of whoever runs a service; they change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    reuse: Literal["exact", "linked"] | None = None
    force_linked: bool | None = None
    documents: Annotated[list[Annotated[str, Field(min_length=1)] | DocumentText], Field(fail_fast=True)] | None = None
    cache_salt: str | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_UINT32)] | None = None
    ignore_eos: bool | None = None

    @property
    def reusable(self) -> list[ReusableText]:
        """The documents."""
        return reusable_texts(self.documents)

    def check(self) -> None:
        """Raises `InvalidRequest` for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream true", field="stream_options", limit="stream true")

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, *, num_top_logprobs: int | None) -> common_pb2.SamplingParams:
        """The parameters as the gateway takes them, but for `max_tokens`. `temperature` is 1 unless stated, as OpenAI's
        clients expect.
        """
        return common_pb2.SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            seed=None if self.seed is None else self.seed % 2**64,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            ignore_eos=bool(self.ignore_eos),
            num_samples=self.n or 1,
            num_top_logprobs=num_top_logprobs,
        )


def message_of(body: GenerationFields, request_id: str) -> gateway_pb2.GenerateRequest:
    """What the gateway is asked, but for the prompt and the sampling."""
    return gateway_pb2.GenerateRequest(
        request_id=request_id,
        model=body.model,
        mode=MODES[body.reuse or "exact"],
        force_linked=bool(body.force_linked),
        cache_salt=body.cache_salt or "",
    )
