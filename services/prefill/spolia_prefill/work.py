"""What a stream asks for, checked before memory is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia.v1 import prefill_pb2
from spolia_core.errors import InvalidRequest, NotSupported
from spolia_core.ids import IdSpace
from spolia_core.prompt import Prompt, check_context_length, check_token_ids
from spolia_core.reuse import PREFIX_CHUNK_TOKENS
from spolia_engine.core import EngineCore
from spolia_engine.link_plan import LinkPlan, plan_recompute
from spolia_node.rpc_messages import prompt_from_pb
from spolia_worker.checks import check_caller, check_local_chunk, readable_ids
from spolia_worker.chunk_fetch import ACCEPTED_CODECS

MAX_FRAGMENTS_PER_CHUNK = 4
"""Of link work, on average. Leading link tokens leave one fragment of each chunk."""


@dataclass(frozen=True, slots=True)
class LocalChunk:
    """A local chunk to compile; `inline` asks for its bytes in the stream."""

    chunk_id: bytes
    token_ids: tuple[int, ...]
    inline: bool


@dataclass(frozen=True, slots=True)
class CompileJob:
    """Local chunks to compile."""

    request_id: str
    tenant_id: str
    chunks: tuple[LocalChunk, ...]

    @property
    def part_tokens(self) -> tuple[int, ...]:
        """Tokens that may have to be computed, of each chunk."""
        return tuple(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens that may have to be computed."""
        return sum(self.part_tokens)


@dataclass(frozen=True, slots=True)
class ContextJob:
    """An exact context: `chain` are the ids of its full prefix blocks."""

    request_id: str
    tenant_id: str
    token_ids: tuple[int, ...]
    num_cached_tokens: int
    chain: tuple[bytes, ...]
    accepts_slices: bool

    @property
    def part_tokens(self) -> tuple[int, ...]:
        """Tokens that may have to be computed: the one part there is."""
        return (len(self.token_ids) - self.num_cached_tokens,)


@dataclass(frozen=True, slots=True)
class LinkJob:
    """Rows to compute over reused chunks: those of `plan`. `chain` are the ids of the exact prefix."""

    request_id: str
    tenant_id: str
    prompt: Prompt
    plan: LinkPlan
    chain: tuple[bytes, ...]

    @property
    def part_tokens(self) -> tuple[int, ...]:
        """Tokens that have to be computed: the one part there is."""
        return (len(self.plan.positions),)


Job = CompileJob | ContextJob | LinkJob


def check_start(start: prefill_pb2.PrefillStart, core: EngineCore, cluster_secret: bytes) -> Job:
    """The job a stream's first message asks for. Raises `InvalidRequest` or `NotSupported`, naming the field."""
    check_caller(start.tenant_id, start.fingerprint, start.num_sink_tokens, core)
    if not set(ACCEPTED_CODECS) & set(start.accepted_codecs):
        raise NotSupported(
            "none of the caller's codecs can be written here",
            field="accepted_codecs",
            limit=", ".join(ACCEPTED_CODECS),
            actual=", ".join(start.accepted_codecs),
        )
    ids, shared_ids = readable_ids(core, cluster_secret, start.tenant_id, start.cache_salt)
    if start.WhichOneof("work") == "compile":
        return _compile_job(start, core, (ids, shared_ids))
    if start.WhichOneof("work") == "context":
        return _context_job(start, core, ids)
    if start.WhichOneof("work") == "link":
        return _link_job(start, core, ids, shared_ids)
    raise InvalidRequest("the start message names no work", field="work", limit="compile, context or link")


def _compile_job(start: prefill_pb2.PrefillStart, core: EngineCore, spaces: Sequence[IdSpace]) -> CompileJob:
    core.adapter.support.require_linked()
    inline = set(start.compile.inline_chunks)
    if not start.compile.chunks:
        raise InvalidRequest("no chunks to compile", field="compile.chunks", limit="≥ 1", actual="0")
    chunks = []
    for index, chunk in enumerate(start.compile.chunks):
        field = f"compile.chunks[{index}]"
        check_token_ids(chunk.token_ids, core.adapter.vocab_size, field=f"{field}.token_ids")
        check_context_length(len(chunk.token_ids), core.adapter.max_context_tokens)
        check_local_chunk(chunk.chunk_id, chunk.token_ids, spaces, f"{field}.chunk_id")
        chunks.append(LocalChunk(chunk.chunk_id, tuple(chunk.token_ids), chunk.chunk_id in inline))
    unknown = inline - {chunk.chunk_id for chunk in chunks}
    if unknown:
        raise InvalidRequest("inline_chunks names ids that are not in chunks", field="compile.inline_chunks")
    return CompileJob(start.request_id, start.tenant_id, _distinct(chunks))


def _distinct(chunks: Sequence[LocalChunk]) -> tuple[LocalChunk, ...]:
    return tuple({chunk.chunk_id: chunk for chunk in chunks}.values())


def _context_job(start: prefill_pb2.PrefillStart, core: EngineCore, ids: IdSpace) -> ContextJob:
    work = start.context
    check_token_ids(work.token_ids, core.adapter.vocab_size, field="context.token_ids")
    check_context_length(len(work.token_ids), core.adapter.max_context_tokens)
    _check_prefix(work.num_cached_tokens, len(work.token_ids), "context.num_cached_tokens")
    return ContextJob(
        start.request_id,
        start.tenant_id,
        tuple(work.token_ids),
        work.num_cached_tokens,
        tuple(ids.prefix_chain(work.token_ids)),
        work.accepts_slices,
    )


def _check_prefix(num_tokens: int, num_context_tokens: int, field: str) -> None:
    """Raises `InvalidRequest` unless so many leading tokens are whole prefix chunks, and some are left to compute."""
    if num_tokens % PREFIX_CHUNK_TOKENS or num_tokens >= num_context_tokens:
        raise InvalidRequest(
            f"{field} must be a multiple of {PREFIX_CHUNK_TOKENS} below {num_context_tokens}, got {num_tokens}",
            field=field,
            limit=f"multiple of {PREFIX_CHUNK_TOKENS}, < {num_context_tokens}",
            actual=str(num_tokens),
        )


def _link_job(start: prefill_pb2.PrefillStart, core: EngineCore, ids: IdSpace, shared_ids: IdSpace) -> LinkJob:
    core.adapter.support.require_linked()
    work = start.link
    prompt = prompt_from_pb(work.parts)
    prompt.validate(vocab_size=core.adapter.vocab_size, max_context_tokens=core.adapter.max_context_tokens)
    for index, part in enumerate(prompt.parts):
        if part.chunk_id is not None:
            check_local_chunk(part.chunk_id, part.token_ids, (ids, shared_ids), f"link.parts[{index}].chunk_id")
    num_prefix_tokens = work.num_prefix_tokens
    _check_prefix(num_prefix_tokens, prompt.num_tokens, "link.num_prefix_tokens")
    positions = _positions(work.rows, num_prefix_tokens, prompt.num_tokens)
    plan = plan_recompute(prompt, set(positions), num_prefix_tokens=num_prefix_tokens)
    if plan.positions != positions:
        raise InvalidRequest(
            f"link.rows holds {len(positions)} rows; with all live tokens and the last one it would hold "
            f"{len(plan.positions)}",
            field="link.rows",
            limit=f"{len(plan.positions)} rows",
            actual=f"{len(positions)} rows",
        )
    _check_fragments(plan, prompt)
    chain = tuple(ids.prefix_chain(prompt.token_ids[:num_prefix_tokens]))
    return LinkJob(start.request_id, start.tenant_id, prompt, plan, chain)


def _check_fragments(plan: LinkPlan, prompt: Prompt) -> None:
    """Raises `InvalidRequest` for rows that cut chunks into many pieces: each is an attend and a merge in every layer,
    inside which the engine cannot be interrupted.
    """
    limit = MAX_FRAGMENTS_PER_CHUNK * sum(part.chunk_id is not None for part in prompt.parts)
    if len(plan.fragments) > limit:
        raise InvalidRequest(
            f"link.rows cuts the chunks into {len(plan.fragments)} fragments, at most {limit} are linked",
            field="link.rows",
            limit=f"{limit} fragments",
            actual=f"{len(plan.fragments)} fragments",
        )


def _positions(rows: Sequence[prefill_pb2.TokenRange], num_prefix_tokens: int, num_tokens: int) -> tuple[int, ...]:
    """Every position of the ranges. Raises `InvalidRequest` unless they ascend behind the prefix, within the prompt."""
    end, found = num_prefix_tokens, list[int]()
    for index, row in enumerate(rows):
        if row.num_tokens < 1 or row.position < end or row.position + row.num_tokens > num_tokens:
            raise InvalidRequest(
                f"link.rows[{index}] is {row.num_tokens} tokens from {row.position} on; ranges ascend between {end} "
                f"and {num_tokens}",
                field=f"link.rows[{index}]",
                limit=f"{end} … {num_tokens}",
                actual=f"{row.position} … {row.position + row.num_tokens}",
            )
        end = row.position + row.num_tokens
        found += range(row.position, end)
    return tuple(found)
