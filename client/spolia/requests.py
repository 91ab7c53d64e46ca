"""Turns what callers give into requests, the same for both clients.

Checked here is what would waste a round trip or cannot be sent at all; the gateway checks everything again. Every
`InvalidRequest` names the field as the contract names it.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from spolia.connection import DEFAULT_MAX_MESSAGE_BYTES
from spolia.options import Mode
from spolia.parts import Document, Documents, Part, Parts, TokenIds
from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import DEFAULT_MAX_TOKENS, SamplingParams

MAX_REQUEST_ID_BYTES = 128
MAX_UINT32 = 2**32 - 1
DOCUMENT_BATCH_BYTES = 4 << 20
MAX_BATCH_DOCUMENTS = 256
"""Documents travel in requests of about these sizes, so that a large corpus is no large request."""

RequestT = TypeVar("RequestT", bound=Message)


@dataclass(frozen=True, slots=True)
class Outgoing(Generic[RequestT]):
    """A request ready to be sent, with its deadline (seconds on the monotonic clock) and metadata."""

    request: RequestT
    deadline_s: float
    request_id: str

    @property
    def timeout_s(self) -> float:
        """Seconds that are left of its time limit; requests made of one list share one."""
        return max(0.0, self.deadline_s - time.monotonic())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What nodes put into their logs."""
        return (("x-request-id", self.request_id),)


@dataclass(frozen=True, slots=True)
class RequestBuilder:
    """Builds the requests of one client; its fields are the client's defaults."""

    timeout_s: float
    model: str = ""
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES

    def __post_init__(self) -> None:
        _check_timeout(self.timeout_s)

    def generate(
        self,
        parts: Parts,
        *,
        mode: Mode = "exact",
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        force_linked: bool = False,
        no_bos: bool = False,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> Outgoing[gateway_pb2.GenerateRequest]:
        """A Generate request; see `GenerateOptions` for the arguments."""
        request_id = _request_id(request_id)
        request = gateway_pb2.GenerateRequest(
            request_id=request_id,
            model=_text(self.model, "model"),
            parts=_prompt_parts(parts),
            mode=common_pb2.ReuseMode.ValueType(_reuse_mode(mode)),
            force_linked=force_linked,
            sampling=_sampling(temperature, top_p, top_k, seed, max_tokens, stop, ignore_eos),
            no_bos=no_bos,
        )
        return self._outgoing(request, "parts", timeout_s, request_id)

    def warm(
        self, documents: Sequence[Document], timeout_s: float | None = None
    ) -> list[Outgoing[gateway_pb2.WarmRequest]]:
        """Warm requests that name all `documents` in order, cut so that none is a large message."""
        request_id = _request_id("")
        requests = [
            gateway_pb2.WarmRequest(request_id=request_id, model=_text(self.model, "model"), documents=batch)
            for batch in _batches(documents)
        ]
        return [self._outgoing(request, "documents", timeout_s, request_id) for request in requests]

    def forget(
        self, documents: Sequence[Document], timeout_s: float | None = None
    ) -> list[Outgoing[gateway_pb2.ForgetRequest]]:
        """Forget requests that name all `documents`."""
        requests = [
            gateway_pb2.ForgetRequest(model=_text(self.model, "model"), documents=batch)
            for batch in _batches(documents)
        ]
        return [self._outgoing(request, "documents", timeout_s) for request in requests]

    def tokenize(self, text: str, timeout_s: float | None = None) -> Outgoing[gateway_pb2.TokenizeRequest]:
        """A Tokenize request."""
        request = gateway_pb2.TokenizeRequest(model=_text(self.model, "model"), text=_text(text, "text"))
        return self._outgoing(request, "text", timeout_s)

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
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else _check_timeout(timeout_s))
        return Outgoing(request, deadline_s, request_id or _request_id(""))


def document_list(documents: Documents) -> list[Document]:
    """`documents` as a list; a `str` becomes a document without a name. Raises `InvalidRequest` for none at all."""
    given: Iterable[object] = (documents,) if isinstance(documents, str | Document) else documents
    built = []
    for index, item in enumerate(given):
        if not isinstance(item, str | Document):
            raise _wrong_type(item, f"documents[{index}]", "str or Document")
        built.append(Document(item) if isinstance(item, str) else item)
    _check_not_empty(built, "documents", "document")
    return built


def _prompt_parts(parts: Parts) -> list[gateway_pb2.PromptPart]:
    given: Iterable[Part] = (parts,) if isinstance(parts, str | Document | TokenIds) else parts
    built = [_prompt_part(part, f"parts[{index}]") for index, part in enumerate(given)]
    _check_not_empty(built, "parts", "part")
    return built


def _prompt_part(part: Part, field: str) -> gateway_pb2.PromptPart:
    match part:
        case str():
            _check_not_empty(part, f"{field}.text", "character")
            return gateway_pb2.PromptPart(text=_text(part, f"{field}.text"))
        case Document():
            return gateway_pb2.PromptPart(document=_document(part, f"{field}.document"))
        case TokenIds():
            _check_not_empty(part.ids, f"{field}.token_ids", "token")
            _check_uint32(min(part.ids), f"{field}.token_ids")
            _check_uint32(max(part.ids), f"{field}.token_ids")
            return gateway_pb2.PromptPart(token_ids=gateway_pb2.TokenIds(ids=part.ids))
        case _:
            raise _wrong_type(part, field, "str, Document or TokenIds")


def _document(document: Document, field: str) -> gateway_pb2.Document:
    _check_not_empty(document.text, f"{field}.text", "character")
    return gateway_pb2.Document(text=_text(document.text, f"{field}.text"), name=_text(document.name, f"{field}.name"))


def _batches(documents: Sequence[Document]) -> Iterator[list[gateway_pb2.Document]]:
    batch: list[gateway_pb2.Document] = []
    size = 0
    for document in [_document(item, f"documents[{index}]") for index, item in enumerate(documents)]:
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
    ignore_eos: bool,
) -> common_pb2.SamplingParams:
    strings = tuple(_text(s, "sampling.stop") for s in ((stop,) if isinstance(stop, str) else stop))
    SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed or 0,
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        stop=strings,
    ).validate()
    _check_uint32(top_k, "sampling.top_k")
    _check_uint32(max_tokens or 0, "sampling.max_tokens")
    return common_pb2.SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=max_tokens,
        stop=strings,
        ignore_eos=ignore_eos,
    )


def _reuse_mode(mode: Mode) -> ReuseMode:
    if isinstance(mode, ReuseMode):
        return mode
    try:
        return ReuseMode[mode.upper()]
    except (KeyError, AttributeError):
        raise InvalidRequest(
            f"mode must be 'exact' or 'linked', got {mode!r}", field="mode", limit="exact, linked", actual=str(mode)
        ) from None


def _request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID_BYTES or not (given.isascii() and given.isprintable()):
        limit = f"≤ {MAX_REQUEST_ID_BYTES} bytes of printable ASCII"
        raise InvalidRequest(
            f"request_id must be {limit}, got {given[:200]!r}",
            field="request_id",
            limit=limit,
            actual=repr(given[:200]),
        )
    return given or uuid.uuid4().hex


def _text(text: str, field: str) -> str:
    """Returns `text`; a lone surrogate is not Unicode and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        actual = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise InvalidRequest(
            f"{field} must be valid Unicode, got {actual}", field=field, limit="no lone surrogates", actual=actual
        ) from None
    return text


def _check_not_empty(value: Sequence[object], field: str, unit: str) -> None:
    if not value:
        raise InvalidRequest(f"{field} is empty", field=field, limit=f"≥ 1 {unit}", actual="0")


def _check_uint32(value: int, field: str) -> None:
    if not 0 <= value <= MAX_UINT32:
        limit = f"0 … {MAX_UINT32}"
        raise InvalidRequest(f"{field} must be {limit}, got {value}", field=field, limit=limit, actual=str(value))


def _check_timeout(timeout_s: float) -> float:
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        limit = "finite and > 0 seconds"
        raise InvalidRequest(
            f"timeout_s must be {limit}, got {timeout_s}", field="timeout_s", limit=limit, actual=str(timeout_s)
        )
    return timeout_s


def _wrong_type(value: object, field: str, wanted: str) -> InvalidRequest:
    given = type(value).__name__
    return InvalidRequest(f"{field} must be {wanted}, got {given}", field=field, limit=wanted, actual=given)
