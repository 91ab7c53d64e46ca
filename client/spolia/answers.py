"""Turns what the gateway sends into values, the same for both clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

from spolia.enum_names import enum_name
from spolia.errors import InternalError
from spolia.parts import Document, Part, TokenIds
from spolia.results import (
    Cluster,
    Delta,
    Forgotten,
    Model,
    Node,
    RequestInFlight,
    Result,
    Reuse,
    Sample,
    ServingFigures,
    TierDropped,
    TokenLogprobs,
    Transfer,
    WarmedDocument,
)
from spolia.store_answers import tier_of
from spolia.v1 import common_pb2, directory_pb2, gateway_pb2, kvstore_pb2
from spolia_core.reuse import ChunkKind, FinishReason, Miss, MissReason, ReuseMode, SourceRun, TokenSource

EnumT = TypeVar("EnumT", bound=IntEnum)


class Answer:
    """A growing answer: takes the messages of one Generate stream in order and ends as a `Result`.

    Times come in as arguments, seconds on one monotonic clock. Raises `InternalError` when a token or a piece of text
    is missing or came twice: a stream may move to another node midway, and this is where it would show.
    """

    def __init__(self, request_id: str, sent_s: float) -> None:
        self._request_id = request_id
        self._sent_s = sent_s
        self._first_token_s: float | None = None
        self._samples: dict[int, _GrowingSample] = {}
        self._result: Result | None = None

    @property
    def finished(self) -> bool:
        """Whether the finish has come."""
        return self._result is not None

    def add(self, response: gateway_pb2.GenerateResponse, now_s: float) -> Delta | None:
        """Takes the next message; returns what is new in it, or None for the finish."""
        match response.WhichOneof("event"):
            case "delta":
                return self._add_delta(response.delta, now_s)
            case "finish":
                self._result = self._finish(response.finish, now_s)
                return None
            case _:
                raise InternalError(f"request {self._request_id}: a message of the stream holds no event known here")

    def result(self) -> Result:
        """The whole answer; raises `InternalError` when the stream ended before its finish."""
        if self._result is None:
            raise InternalError(f"request {self._request_id}: the stream ended before its finish")
        return self._result

    def _add_delta(self, delta: common_pb2.TokenDelta, now_s: float) -> Delta:
        sample = self._samples.setdefault(delta.sample_index, _GrowingSample())
        if delta.token_ids:
            self._check_continues("token", delta.token_index, len(sample.token_ids))
            self._first_token_s = now_s if self._first_token_s is None else self._first_token_s
        if delta.text:
            self._check_continues("code point", delta.text_offset, sample.num_code_points)
        told = tuple(TokenLogprobs(t.logprob, tuple((p.token_id, p.logprob) for p in t.top)) for t in delta.logprobs)
        sample.token_ids.extend(delta.token_ids)
        sample.texts.append(delta.text)
        sample.logprobs.extend(told)
        sample.num_code_points += len(delta.text)
        return Delta(delta.text, tuple(delta.token_ids), delta.token_index, delta.sample_index, told)

    def _finish(self, finish: common_pb2.Finish, now_s: float) -> Result:
        ended = finish.samples or [_only_sample(finish)]
        newest = max(self._samples, default=0)
        if newest >= len(ended):
            self._check_continues("sample", newest, len(ended) - 1)
        samples = []
        for index, told in enumerate(ended):
            sample = self._samples.get(index, _GrowingSample())
            self._check_continues("token", told.num_generated_tokens, len(sample.token_ids))
            samples.append(sample.ended(_member(FinishReason, told.reason)))
        first_s = now_s if self._first_token_s is None else self._first_token_s
        return Result(
            request_id=self._request_id,
            text=samples[0].text,
            token_ids=samples[0].token_ids,
            finish_reason=samples[0].finish_reason,
            num_prompt_tokens=finish.num_prompt_tokens,
            num_generated_tokens=finish.num_generated_tokens,
            ttft_ms=(first_s - self._sent_s) * 1e3,
            e2e_ms=(now_s - self._sent_s) * 1e3,
            seed=finish.seed,
            reuse=reuse_of(finish.reuse),
            samples=tuple(samples),
        )

    def _check_continues(self, unit: str, index: int, expected: int) -> None:
        if index != expected:
            raise InternalError(
                f"request {self._request_id}: the stream goes on at {unit} {index} where {expected} was due",
                field=unit,
                limit=str(expected),
                actual=str(index),
            )


@dataclass(slots=True)
class _GrowingSample:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_code_points: int = 0

    def ended(self, reason: FinishReason) -> Sample:
        return Sample("".join(self.texts), tuple(self.token_ids), reason, tuple(self.logprobs))


def _only_sample(finish: common_pb2.Finish) -> common_pb2.SampleFinish:
    """What a gateway that knows of one sample only says of it."""
    return common_pb2.SampleFinish(reason=finish.reason, num_generated_tokens=finish.num_generated_tokens)


class WarmProgress:
    """Collects which documents are warm, over all requests that were made of one list, and tells `on_progress`."""

    def __init__(
        self, documents: Sequence[Document], on_progress: Callable[[WarmedDocument], None] | None = None
    ) -> None:
        self._names = [document.name for document in documents]
        self._on_progress = on_progress
        self._warmed: dict[int, WarmedDocument] = {}
        self._first_index = self._next_index = 0

    def begin(self, request: gateway_pb2.WarmRequest) -> None:
        """What comes from now on is of this request, the next of the list's."""
        self._first_index = self._next_index
        self._next_index += len(request.documents)

    def add(self, response: gateway_pb2.WarmResponse) -> None:
        """Takes a message."""
        index = self._first_index + response.document_index
        if index >= len(self._names) or index in self._warmed:
            raise InternalError(f"document {index} of {len(self._names)} was reported unasked or twice")
        self._warmed[index] = WarmedDocument(
            index=index,
            name=self._names[index],
            num_tokens=response.num_tokens,
            size_bytes=response.size_bytes,
            already_stored=response.already_stored,
            elapsed_ms=response.elapsed_ms,
            num_chunks=response.num_chunks or 1,
            num_computed_chunks=response.num_computed_chunks
            if response.num_chunks
            else int(not response.already_stored),
        )
        if self._on_progress is not None:
            self._on_progress(self._warmed[index])

    def result(self) -> list[WarmedDocument]:
        """All documents in the order given; raises `InternalError` when one was not reported."""
        missing = [index for index in range(len(self._names)) if index not in self._warmed]
        if missing:
            raise InternalError(f"the stream ended without documents {missing}")
        return [self._warmed[index] for index in range(len(self._names))]


def reuse_of(report: common_pb2.ReuseReport) -> Reuse:
    """A reuse report as a value."""
    return Reuse(
        mode=_member(ReuseMode, report.mode),
        sources={_member(TokenSource, s.source): s.num_tokens for s in report.sources},
        misses=tuple(
            Miss(m.chunk_id, _member(ChunkKind, m.kind), _member(MissReason, m.reason), m.num_tokens)
            for m in report.misses
        ),
        transfers=tuple(
            Transfer(enum_name(common_pb2.DataPlane.DESCRIPTOR, t.plane), t.chunk_bytes, t.live_bytes, t.inline_bytes)
            for t in report.transfers
        ),
        profile=report.profile,
        link_tokens_per_chunk=report.link_tokens_per_chunk,
        nodes=tuple(report.nodes),
        forced=report.forced,
        sink_tokens_per_chunk=report.sink_tokens_per_chunk,
        runs=tuple(SourceRun(_member(TokenSource, run.source), run.num_tokens) for run in report.runs),
    )


def forgotten_of(responses: list[gateway_pb2.ForgetResponse]) -> Forgotten:
    """The sum of what several Forget calls dropped."""
    return Forgotten(
        num_stored_dropped=sum(r.num_stored_dropped for r in responses),
        stored_bytes_dropped=sum(r.stored_bytes_dropped for r in responses),
        num_resident_dropped=sum(r.num_resident_dropped for r in responses),
        stored_tiers=_tiers_dropped([count for response in responses for count in response.stored_tiers]),
    )


def _tiers_dropped(counts: list[kvstore_pb2.TierCount]) -> tuple[TierDropped, ...]:
    """One for each tier, fastest first."""
    return tuple(
        TierDropped(
            enum_name(common_pb2.Tier.DESCRIPTOR, tier),
            sum(count.num_objects for count in counts if count.tier == tier),
            sum(count.num_bytes for count in counts if count.tier == tier),
        )
        for tier in sorted({count.tier for count in counts})
    )


def parts_of(response: gateway_pb2.RenderChatResponse) -> list[Part]:
    """The prompt of an answer."""
    return [_part_of(part) for part in response.parts]


def _part_of(part: gateway_pb2.PromptPart) -> Part:
    match part.WhichOneof("part"):
        case "document":
            return Document(part.document.text, part.document.name)
        case "token_ids":
            return TokenIds(part.token_ids.ids)
        case _:
            return part.text


def models_of(response: gateway_pb2.ListModelsResponse) -> list[Model]:
    """The models of an answer."""
    return [
        Model(
            m.name,
            m.max_context_tokens,
            m.vocab_size,
            m.fingerprint,
            tuple(_member(ReuseMode, mode) for mode in m.modes),
            m.profile,
            m.policy,
            m.linked_refusal,
            m.can_force_linked,
        )
        for m in response.models
    ]


def cluster_of(response: gateway_pb2.GetClusterResponse) -> Cluster:
    """The cluster of an answer."""
    return Cluster(
        nodes=tuple(_node_of(record) for record in response.nodes),
        directory_reachable=response.directory_reachable,
        requests=tuple(map(_request_of, response.requests)),
        gateway_node_id=response.gateway_node_id,
        clock_s=response.clock_ms / 1000,
    )


def _request_of(request: gateway_pb2.RequestInFlight) -> RequestInFlight:
    return RequestInFlight(
        request_id=request.request_id,
        phase=enum_name(gateway_pb2.RequestPhase.DESCRIPTOR, request.phase),
        age_ms=request.age_ms,
        mode=_member(ReuseMode, request.mode),
        num_prompt_tokens=request.num_prompt_tokens,
        num_generated_tokens=request.num_generated_tokens,
        decode_node=request.decode_node,
        tenant_id=request.tenant_id,
    )


def _node_of(record: directory_pb2.NodeRecord) -> Node:
    return Node(
        node_id=record.node_id,
        role=enum_name(directory_pb2.NodeRole.DESCRIPTOR, record.role),
        address=record.address,
        model=record.model.name,
        num_running=record.load.num_running,
        num_waiting=record.load.num_waiting,
        queued_tokens=record.load.queued_tokens,
        total_blocks=record.load.total_blocks,
        available_blocks=record.load.available_blocks,
        referenced_blocks=record.load.referenced_blocks,
        cached_blocks=record.load.cached_blocks,
        in_transfer_blocks=record.load.in_transfer_blocks,
        lent_blocks=record.load.lent_blocks,
        num_held_chunks=len(record.held_chunks),
        draining=record.draining,
        version=record.version,
        profile=record.model.profile,
        policy=record.model.policy,
        linked_refusal=record.model.linked_refusal,
        can_force_linked=record.model.supports_linked and bool(record.model.linked_refusal),
        tiers=tuple(map(tier_of, record.load.tiers)),
        serving=_serving_of(record.load.serving) if record.load.HasField("serving") else None,
        metrics_address=record.metrics_address,
    )


def _serving_of(figures: directory_pb2.ServingFigures) -> ServingFigures:
    return ServingFigures(
        window_s=figures.window_s,
        num_requests=figures.num_requests,
        num_prompt_tokens=figures.num_prompt_tokens,
        num_cached_tokens=figures.num_cached_tokens,
        num_generated_tokens=figures.num_generated_tokens,
        ttft_p50_ms=figures.ttft_p50_ms,
        ttft_p95_ms=figures.ttft_p95_ms,
        itl_p50_ms=figures.itl_p50_ms,
        itl_p95_ms=figures.itl_p95_ms,
    )


def _member(enum: type[EnumT], value: int) -> EnumT:
    """The member with this value. A newer gateway may know more than this release; its answers stay readable."""
    try:
        return enum(value)
    except ValueError:
        unknown = int.__new__(enum, value)
        unknown._name_, unknown._value_ = f"UNKNOWN_{value}", value
        return unknown
