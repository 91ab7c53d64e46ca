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
from spolia_worker.checks import check_caller, is_local_chunk, readable_ids


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """What to answer, and where the answer stood when its last node died. `forced`: LINKED against the profile."""

    request_id: str
    tenant_id: str
    ids: IdSpace
    prompt: Prompt
    mode: ReuseMode
    forced: bool
    sampling: SamplingParams
    prefill_hints: tuple[str, ...]
    received_ids: tuple[int, ...]
    received_code_points: int

    @property
    def context(self) -> Prompt:
        """What the model reads before the next token: the prompt, and on a replay the tokens received."""
        if not self.received_ids:
            return self.prompt
        return Prompt((*self.prompt.parts, Part(self.received_ids)))

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
    ids, shared_ids = readable_ids(core, cluster_secret, request.tenant_id)
    _check_chunk_ids(prompt.parts, (ids, shared_ids))
    received = tuple(request.resume.token_ids)
    if received:
        check_token_ids(received, core.adapter.vocab_size, field="resume.token_ids")
        if len(received) > sampling.max_tokens:
            raise InvalidRequest(
                f"resume holds {len(received)} tokens, max_tokens is {sampling.max_tokens}",
                field="resume.token_ids",
                limit=str(sampling.max_tokens),
                actual=str(len(received)),
            )
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
        request.resume.num_text_code_points,
    )


def _check_chunk_ids(parts: Sequence[Part], spaces: Sequence[IdSpace]) -> None:
    for index, part in enumerate(parts):
        if part.chunk_id is not None and not is_local_chunk(part.chunk_id, part.token_ids, spaces):
            field = f"parts[{index}].chunk_id"
            raise InvalidRequest(f"{field} is not the id of these tokens", field=field, actual=part.chunk_id.hex())
