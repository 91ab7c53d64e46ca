"""Turns what callers give into requests, the same for both clients.

Checked here is what would waste a round trip or cannot be sent at all; the gateway checks everything again. Every
`InvalidRequest` names the field as the contract names it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from google.protobuf.message import Message

from spolia.argument_checks import (
    checked_bool,
    checked_float,
    checked_int,
    checked_items,
    checked_request_id,
    checked_retry,
    checked_text,
    checked_timeout,
    checked_uint32,
)
from spolia.connection import DEFAULT_MAX_MESSAGE_BYTES, Door
from spolia.constraint_arguments import constraint_asked
from spolia.constraint_message import set_constraint
from spolia.lifetime import Lifetime
from spolia.options import Mode, SplitterName
from spolia.parts import Document
from spolia.prompts import Prompt, document_message
from spolia.retries import Patience
from spolia.trace_context import trace_metadata
from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.constraint import Constraint
from spolia_core.errors import InvalidRequest
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import DEFAULT_MAX_TOKENS, SamplingParams
from spolia_core.splitting import Splitter, Splitting

DOCUMENT_BATCH_BYTES = 1 << 20
MAX_BATCH_DOCUMENTS = 256
"""Documents travel in requests of about these sizes, so that a large corpus is no large request, and has no more chunks
than one may have however it is cut."""

DEFAULT_RETRY_S = 15.0
"""By default a gateway takes up to 10 s to end what it has under way; the next one starts in a few more."""

RequestT = TypeVar("RequestT", bound=Message)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outgoing(Generic[RequestT]):
    """A request ready to be sent, with its deadline (seconds on the monotonic clock) and metadata."""

    request: RequestT
    deadline_s: float
    request_id: str
    api_key: str = field(default="", repr=False)
    retry_s: float = 0.0

    def send(self, method: Callable[..., T]) -> T:
        """Calls a method of a gateway's stub with it, blocking or not, with what is left of its time."""
        return method(self.request, timeout=self.timeout_s, metadata=self.metadata)

    def patience(self, lifetime: Lifetime, door: Door) -> Patience:
        """For how long it is tried at `door`, from now on."""
        until_s = min(time.monotonic() + self.retry_s, self.deadline_s)
        return Patience(until_s, lifetime, door, self.deadline_s)

    @property
    def timeout_s(self) -> float:
        """Seconds that are left of its time limit; requests made of one list share one."""
        return max(0.0, self.deadline_s - time.monotonic())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What nodes put into their logs, the caller's trace where it has one, and who asks."""
        named = (("x-request-id", self.request_id), *trace_metadata())
        return (*named, ("authorization", f"Bearer {self.api_key}")) if self.api_key else named


@dataclass(frozen=True, slots=True)
class RequestBuilder:
    """Builds the requests of one client; its fields are the client's defaults."""

    timeout_s: float
    model: str = ""
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    api_key: str = field(default="", repr=False)
    retry_s: float = DEFAULT_RETRY_S

    def __post_init__(self) -> None:
        checked_timeout(self.timeout_s)
        checked_retry(self.retry_s)
        checked_text(self.model, "model")
        checked_int(self.max_message_bytes, "max_message_bytes")

    def generate(
        self,
        prompt: Prompt,
        *,
        mode: Mode = "exact",
        splitter: SplitterName | None = None,
        split_max_tokens: int | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        n: int = 1,
        logprobs: int | None = None,
        json_schema: str | Mapping[str, object] | None = None,
        json_object: bool = False,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        lark: str | None = None,
        ignore_eos: bool = False,
        force_linked: bool = False,
        no_bos: bool = False,
        cache_salt: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Outgoing[gateway_pb2.GenerateRequest]:
        """A Generate request; see `GenerateOptions` for the arguments."""
        request_id = checked_request_id(request_id) or _new_id()
        constraint = constraint_asked(json_schema, json_object, regex, choices, lark)
        request = gateway_pb2.GenerateRequest(
            request_id=request_id,
            model=self.model,
            parts=prompt.parts,
            messages=prompt.messages,
            documents=prompt.documents,
            mode=common_pb2.ReuseMode.ValueType(_reuse_mode(mode)),
            force_linked=checked_bool(force_linked, "force_linked"),
            sampling=_sampling(temperature, top_p, top_k, seed, max_tokens, stop, n, logprobs, ignore_eos, constraint),
            no_bos=checked_bool(no_bos, "no_bos"),
            cache_salt=checked_text(cache_salt, "cache_salt"),
            splitting=_splitting(splitter, split_max_tokens),
        )
        return self._outgoing(request, prompt.large_field, timeout_s, request_id)

    def warm(
        self,
        documents: Sequence[Document],
        timeout_s: float | None = None,
        *,
        splitter: SplitterName | None = None,
        split_max_tokens: int | None = None,
        cache_salt: str = "",
    ) -> list[Outgoing[gateway_pb2.WarmRequest]]:
        """Warm requests that name all `documents` in order, cut so that none is a large message."""
        request_id, splitting = _new_id(), _splitting(splitter, split_max_tokens)
        salt = checked_text(cache_salt, "cache_salt")
        requests = [
            gateway_pb2.WarmRequest(
                request_id=request_id, model=self.model, documents=batch, splitting=splitting, cache_salt=salt
            )
            for batch in _batches(documents)
        ]
        return [self._outgoing(request, "documents", timeout_s, request_id) for request in requests]

    def forget(
        self,
        documents: Sequence[Document],
        timeout_s: float | None = None,
        *,
        splitter: SplitterName | None = None,
        split_max_tokens: int | None = None,
        cache_salt: str = "",
    ) -> list[Outgoing[gateway_pb2.ForgetRequest]]:
        """Forget requests that name all `documents`."""
        splitting, salt = _splitting(splitter, split_max_tokens), checked_text(cache_salt, "cache_salt")
        requests = [
            gateway_pb2.ForgetRequest(model=self.model, documents=batch, splitting=splitting, cache_salt=salt)
            for batch in _batches(documents)
        ]
        return [self._outgoing(request, "documents", timeout_s) for request in requests]

    def tokenize(self, text: str, timeout_s: float | None = None) -> Outgoing[gateway_pb2.TokenizeRequest]:
        """A Tokenize request."""
        request = gateway_pb2.TokenizeRequest(model=self.model, text=checked_text(text, "text"))
        return self._outgoing(request, "text", timeout_s)

    def render_chat(self, chat: Prompt, timeout_s: float | None = None) -> Outgoing[gateway_pb2.RenderChatRequest]:
        """A RenderChat request."""
        request = gateway_pb2.RenderChatRequest(model=self.model, messages=chat.messages, documents=chat.documents)
        return self._outgoing(request, chat.large_field, timeout_s)

    def models(self, timeout_s: float | None = None) -> Outgoing[gateway_pb2.ListModelsRequest]:
        """A ListModels request."""
        return self._outgoing(gateway_pb2.ListModelsRequest(), "", timeout_s)

    def cluster(self, timeout_s: float | None = None) -> Outgoing[gateway_pb2.GetClusterRequest]:
        """A GetCluster request."""
        return self._outgoing(gateway_pb2.GetClusterRequest(), "", timeout_s)

    def _outgoing(
        self, request: RequestT, large_field: str, timeout_s: float | None, request_id: str = ""
    ) -> Outgoing[RequestT]:
        size = request.ByteSize()
        if size > self.max_message_bytes:
            raise InvalidRequest(
                f"the request has {size} bytes; a message holds at most {self.max_message_bytes}",
                field=large_field,
                limit=f"{self.max_message_bytes} bytes",
                actual=f"{size} bytes",
            )
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else checked_timeout(timeout_s))
        return Outgoing(request, deadline_s, request_id or _new_id(), self.api_key, self.retry_s)


def _batches(documents: Sequence[Document]) -> Iterator[list[gateway_pb2.Document]]:
    batch: list[gateway_pb2.Document] = []
    size = 0
    for document in [document_message(item, f"documents[{index}]") for index, item in enumerate(documents)]:
        full = len(batch) == MAX_BATCH_DOCUMENTS or size + document.ByteSize() > DOCUMENT_BATCH_BYTES
        if batch and full:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += document.ByteSize()
    yield batch


def _sampling(
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    max_tokens: int | None,
    stop: str | Sequence[str],
    n: int,
    logprobs: int | None,
    ignore_eos: bool,
    constraint: Constraint | None,
) -> common_pb2.SamplingParams:
    given = (stop,) if isinstance(stop, str) else checked_items(stop, "sampling.stop", "str or a sequence of str")
    params = SamplingParams(
        temperature=checked_float(temperature, "sampling.temperature"),
        top_p=checked_float(top_p, "sampling.top_p"),
        top_k=checked_int(top_k, "sampling.top_k"),
        seed=0 if seed is None else checked_int(seed, "sampling.seed"),
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else checked_int(max_tokens, "sampling.max_tokens"),
        stop=tuple(checked_text(text, "sampling.stop") for text in given),
        ignore_eos=checked_bool(ignore_eos, "sampling.ignore_eos"),
        num_samples=checked_int(n, "sampling.num_samples"),
        num_top_logprobs=None if logprobs is None else checked_int(logprobs, "sampling.num_top_logprobs"),
        constraint=constraint,
    )
    params.validate()
    message = common_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=checked_uint32(params.top_k, "sampling.top_k"),
        seed=None if seed is None else params.seed,
        max_tokens=None if max_tokens is None else checked_uint32(params.max_tokens, "sampling.max_tokens"),
        stop=params.stop,
        ignore_eos=params.ignore_eos,
        num_samples=0 if params.num_samples == 1 else params.num_samples,
        num_top_logprobs=params.num_top_logprobs,
    )
    set_constraint(message, constraint)
    return message


def _reuse_mode(mode: Mode) -> ReuseMode:
    if isinstance(mode, ReuseMode):
        return mode
    try:
        return ReuseMode[mode.upper()]
    except (KeyError, AttributeError):
        raise InvalidRequest(
            f"mode must be 'exact' or 'linked', got {mode!r}", field="mode", limit="exact, linked", actual=str(mode)
        ) from None


def _splitting(splitter: SplitterName | None, max_tokens: int | None) -> gateway_pb2.Splitting | None:
    """None where the gateway is to choose."""
    if splitter is None and max_tokens is None:
        return None
    if max_tokens is not None:
        Splitting(max_tokens=checked_int(max_tokens, "splitting.max_tokens"))  # raises for one out of bounds
    number = gateway_pb2.SPLITTER_UNSPECIFIED if splitter is None else int(_splitter(splitter))
    return gateway_pb2.Splitting(splitter=gateway_pb2.Splitter.ValueType(number), max_tokens=max_tokens or 0)


def _splitter(splitter: SplitterName) -> Splitter:
    if isinstance(splitter, Splitter):
        return splitter
    try:
        return Splitter[splitter.upper()]
    except (KeyError, AttributeError):
        known = ", ".join(each.name.lower() for each in Splitter)
        raise InvalidRequest(
            f"splitting.splitter must be one of {known}, got {splitter!r}",
            field="splitting.splitter",
            limit=known,
            actual=str(splitter) or "''",
        ) from None


def _new_id() -> str:
    return uuid.uuid4().hex
