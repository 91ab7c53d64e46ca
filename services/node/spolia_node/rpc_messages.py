"""Domain values to messages and back. Nothing else reads or writes these messages field by field."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from enum import IntEnum
from typing import TypeVar

from spolia.constraint_message import constraint_of, set_constraint
from spolia.v1 import common_pb2
from spolia_core.chunk_object import ChunkMeta
from spolia_core.digests import digest
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.ids import ID_BYTES
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ChunkKind, Miss, MissReason, ReuseMode, ReuseReport, SourceRun, TokenSource
from spolia_core.sampling import DEFAULT_MAX_TOKENS, SamplingParams

E = TypeVar("E", bound=IntEnum)


def sampling_to_pb(params: SamplingParams) -> common_pb2.SamplingParams:
    """Every field set, seed and max_tokens included."""
    message = common_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop=params.stop,
        ignore_eos=params.ignore_eos,
        num_samples=params.num_samples,
        num_top_logprobs=params.num_top_logprobs,
    )
    set_constraint(message, params.constraint)
    return message


def sampling_from_pb(
    message: common_pb2.SamplingParams, *, default_seed: int, default_max_tokens: int = DEFAULT_MAX_TOKENS
) -> SamplingParams:
    """Unset fields get their defaults. Raises `InvalidRequest` naming the first bad field."""
    params = SamplingParams(
        temperature=_as_written(message.temperature),
        top_p=_as_written(message.top_p) if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        seed=message.seed if message.HasField("seed") else default_seed,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else default_max_tokens,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        num_samples=message.num_samples or 1,
        num_top_logprobs=message.num_top_logprobs if message.HasField("num_top_logprobs") else None,
        constraint=constraint_of(message),
    )
    params.validate()
    return params


def report_to_pb(report: ReuseReport) -> common_pb2.ReuseReport:
    """Sources with no tokens are left out; so is the transfer when no byte moved."""
    moved = report.chunk_bytes or report.live_bytes or report.inline_bytes
    transfer = common_pb2.TransferCount(
        plane=common_pb2.DATA_PLANE_GRPC,
        chunk_bytes=report.chunk_bytes,
        live_bytes=report.live_bytes,
        inline_bytes=report.inline_bytes,
    )
    return common_pb2.ReuseReport(
        mode=common_pb2.ReuseMode.ValueType(report.mode),
        sources=[_count_to_pb(source, count) for source, count in sorted(report.sources.items()) if count],
        misses=[_miss_to_pb(miss) for miss in report.misses],
        transfers=[transfer] if moved else [],
        profile=report.profile,
        link_tokens_per_chunk=report.link_tokens_per_chunk,
        nodes=report.nodes,
        forced=report.forced,
        sink_tokens_per_chunk=report.sink_tokens_per_chunk,
        runs=[_count_to_pb(run.source, run.num_tokens) for run in report.runs],
    )


def report_from_pb(message: common_pb2.ReuseReport) -> ReuseReport:
    """Bytes are those moved over gRPC. Raises `NotSupported` for a mode, source or reason unknown to this release."""
    over_grpc = [t for t in message.transfers if t.plane == common_pb2.DATA_PLANE_GRPC]
    sources: Counter[TokenSource] = Counter()
    for count in message.sources:
        sources[_known(TokenSource, count.source, "reuse.sources")] += count.num_tokens
    return ReuseReport(
        mode=_known(ReuseMode, message.mode, "reuse.mode"),
        sources=sources,
        misses=[_miss_from_pb(miss) for miss in message.misses],
        chunk_bytes=sum(t.chunk_bytes for t in over_grpc),
        live_bytes=sum(t.live_bytes for t in over_grpc),
        inline_bytes=sum(t.inline_bytes for t in over_grpc),
        profile=message.profile,
        link_tokens_per_chunk=message.link_tokens_per_chunk,
        nodes=list(message.nodes),
        forced=message.forced,
        sink_tokens_per_chunk=message.sink_tokens_per_chunk,
        runs=[SourceRun(_known(TokenSource, run.source, "reuse.runs"), run.num_tokens) for run in message.runs],
    )


def prompt_to_pb(prompt: Prompt) -> list[common_pb2.TokenPart]:
    """The parts, in order; live parts carry no chunk id."""
    return [common_pb2.TokenPart(token_ids=part.token_ids, chunk_id=part.chunk_id or b"") for part in prompt.parts]


def prompt_from_pb(parts: Iterable[common_pb2.TokenPart]) -> Prompt:
    """The prompt; `Prompt.validate` still has to see it. Raises `InvalidRequest` for a chunk id of a wrong length."""
    return Prompt(tuple(_part_from_pb(index, part) for index, part in enumerate(parts)))


def mode_from_pb(mode: int, *, unspecified: ReuseMode | None = None) -> ReuseMode:
    """The mode; `unspecified` is what UNSPECIFIED means here, if anything. Raises `InvalidRequest` otherwise."""
    if mode == common_pb2.REUSE_MODE_UNSPECIFIED and unspecified is not None:
        return unspecified
    try:
        return ReuseMode(mode)
    except ValueError:
        names = ", ".join(known.name for known in ReuseMode)
        raise InvalidRequest(f"mode must be {names}, got {mode}", field="mode", limit=names, actual=str(mode)) from None


def object_info(
    meta: ChunkMeta, data: bytes | bytearray | memoryview, *, replica: str = "", compute_s: float = 0.0
) -> common_pb2.ObjectInfo:
    """What is said of a chunk object; takes the digest of all of `data`. 0 `compute_s`: its cost was not measured."""
    view = memoryview(data).cast("B")
    return common_pb2.ObjectInfo(
        chunk_id=meta.chunk_id,
        kind=common_pb2.ChunkKind.ValueType(meta.kind),
        format_version=meta.format_version,
        codec=meta.codec,
        fingerprint=meta.fingerprint,
        num_tokens=meta.num_tokens,
        size_bytes=len(view),
        digest=digest(view),
        replica=replica,
        compute_s=compute_s,
    )


def _part_from_pb(index: int, part: common_pb2.TokenPart) -> Part:
    if len(part.chunk_id) not in (0, ID_BYTES):
        field, size = f"parts[{index}].chunk_id", len(part.chunk_id)
        raise InvalidRequest(
            f"{field} must be {ID_BYTES} bytes, or empty for live tokens; got {size}",
            field=field,
            limit=f"{ID_BYTES} bytes",
            actual=f"{size} bytes",
        )
    return Part(tuple(part.token_ids), part.chunk_id or None)


def _count_to_pb(source: TokenSource, num_tokens: int) -> common_pb2.SourceCount:
    return common_pb2.SourceCount(source=common_pb2.TokenSource.ValueType(source), num_tokens=num_tokens)


def _miss_to_pb(miss: Miss) -> common_pb2.Miss:
    return common_pb2.Miss(
        chunk_id=miss.chunk_id,
        kind=common_pb2.ChunkKind.ValueType(miss.kind),
        reason=common_pb2.MissReason.ValueType(miss.reason),
        num_tokens=miss.num_tokens,
    )


def _miss_from_pb(message: common_pb2.Miss) -> Miss:
    return Miss(
        chunk_id=message.chunk_id,
        kind=_known(ChunkKind, message.kind, "reuse.misses.kind"),
        reason=_known(MissReason, message.reason, "reuse.misses.reason"),
        num_tokens=message.num_tokens,
    )


def _known(kind: type[E], number: int, field: str) -> E:
    try:
        return kind(number)
    except ValueError:
        raise NotSupported(
            f"{field} holds {kind.__name__} {number}, which this release does not know", field=field, actual=str(number)
        ) from None


def _as_written(single: float) -> float:
    """The shortest decimal that is this float32: 0.7 rather than 0.699999988.

    The wire carries float32. Without this, a node would sample with other numbers than the caller's own process would.
    """
    if single.is_integer():  # as 0 and 1, which most requests have
        return single
    for num_digits in range(6, 10):
        shorter = float(f"{single:.{num_digits}g}")
        if struct.pack("f", shorter) == struct.pack("f", single):
            return shorter
    return single
