"""A request as a decode node takes it: checked before any memory is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spolia.v1.decode_pb2 import DecodeServiceGenerateRequest
from spolia_core.errors import InvalidRequest
from spolia_core.ids import IdSpace
from spolia_core.link_terms import LinkTerms
from spolia_core.prompt import Part, Prompt, check_answer_length, check_token_ids
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.core import EngineCore
from spolia_node.rpc_messages import mode_from_pb, prompt_from_pb, sampling_from_pb
from spolia_worker.checks import check_caller, check_local_chunk, readable_ids


@dataclass(frozen=True, slots=True)
class ReceivedSample:
    """What a caller has received of a sample."""

    token_ids: tuple[int, ...] = ()
    num_code_points: int = 0


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """What to answer, and where the answers stood when their last node died. `forced`: LINKED against the profile."""

    request_id: str
    tenant_id: str
    ids: IdSpace
    prompt: Prompt
    mode: ReuseMode
    forced: bool
    sampling: SamplingParams
    prefill_hints: tuple[str, ...]
    received: tuple[ReceivedSample, ...]
    """By index: where each sample stood when its last node died. Those behind the last have nothing yet."""
    received_ids: tuple[int, ...] = ()
    """Of the sample that is being worked on, counted to its context."""
    cache_salt: str = ""
    """What entered `ids` beside the tenant, for whoever derives them again."""

    @property
    def context(self) -> Prompt:
        """What the model reads before the next token: the prompt, and on a replay the tokens received."""
        if not self.received_ids:
            return self.prompt
        return Prompt((*self.prompt.parts, Part(self.received_ids)))

    def where(self, sample_index: int) -> ReceivedSample:
        """Where a sample stood."""
        return self.received[sample_index] if sample_index < len(self.received) else ReceivedSample()

    def resumed(self, token_ids: Sequence[int]) -> GenerateJob:
        """The job of an answer that stands at `token_ids` and lost its KV."""
        return replace(self, received_ids=tuple(token_ids))

    @property
    def max_new_tokens(self) -> int:
        """Most tokens still to come."""
        return self.sampling.max_tokens - len(self.received_ids)


def check_job(
    request: DecodeServiceGenerateRequest, core: EngineCore, terms: LinkTerms, cluster_secret: bytes
) -> GenerateJob:
    """The job a request asks for. Raises `InvalidRequest` or `NotSupported`, naming the field and the limit."""
    check_caller(request.tenant_id, request.fingerprint, request.num_sink_tokens, core)
    mode, forced = mode_from_pb(request.mode), False
    if mode is ReuseMode.LINKED:
        core.adapter.support.require_linked()
        # Gateways look too, but what they know of this node may be old.
        forced = terms.check(force_linked=request.force_linked)
    prompt = prompt_from_pb(request.parts)
    prompt.validate(vocab_size=core.adapter.vocab_size, max_context_tokens=core.adapter.max_context_tokens)
    sampling = sampling_from_pb(request.sampling, default_seed=0)
    check_answer_length(prompt.num_tokens, sampling.max_tokens, core.adapter.max_context_tokens)
    ids, shared_ids = readable_ids(core, cluster_secret, request.tenant_id, request.cache_salt)
    _check_chunk_ids(prompt.parts, (ids, shared_ids))
    received = tuple(
        ReceivedSample(tuple(sample.token_ids), sample.num_text_code_points) for sample in request.resume.samples
    )
    _check_received(received, sampling, core.adapter.vocab_size)
    return GenerateJob(
        request.request_id,
        request.tenant_id,
        ids,
        prompt,
        mode,
        forced,
        sampling,
        tuple(request.prefill_hints),
        received,
        cache_salt=request.cache_salt,
    )


def _check_received(received: Sequence[ReceivedSample], sampling: SamplingParams, vocab_size: int) -> None:
    if len(received) > sampling.num_samples:
        raise InvalidRequest(
            f"resume holds {len(received)} samples, num_samples is {sampling.num_samples}",
            field="resume.samples",
            limit=str(sampling.num_samples),
            actual=str(len(received)),
        )
    for index, sample in enumerate(received):
        if sample.token_ids:
            field = f"resume.samples[{index}].token_ids"
            check_token_ids(sample.token_ids, vocab_size, field=field)
            if len(sample.token_ids) > sampling.max_tokens:
                raise InvalidRequest(
                    f"{field} holds {len(sample.token_ids)} tokens, max_tokens is {sampling.max_tokens}",
                    field=field,
                    limit=str(sampling.max_tokens),
                    actual=str(len(sample.token_ids)),
                )


def _check_chunk_ids(parts: Sequence[Part], spaces: Sequence[IdSpace]) -> None:
    for index, part in enumerate(parts):
        if part.chunk_id is not None:
            check_local_chunk(part.chunk_id, part.token_ids, spaces, f"parts[{index}].chunk_id")
