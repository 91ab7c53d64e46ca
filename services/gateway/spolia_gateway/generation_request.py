"""One generation, ready to be sent to any decode node that serves its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.prompt import Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_gateway.catalog import ModelKey

_MODES = {
    ReuseMode.EXACT: common_pb2.REUSE_MODE_EXACT,
    ReuseMode.LINKED: common_pb2.REUSE_MODE_LINKED,
}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """All that a decode node, or its replacement, must be told; seed and max_tokens are settled."""

    request_id: str
    tenant_id: str
    model: ModelKey
    prompt: Prompt
    mode: ReuseMode
    force_linked: bool
    sampling: SamplingParams

    def message(
        self, prefill_hints: Sequence[str] = (), resume: decode_pb2.Resume | None = None
    ) -> decode_pb2.DecodeServiceGenerateRequest:
        """The call to a decode node. `resume` makes it a replay."""
        return decode_pb2.DecodeServiceGenerateRequest(
            request_id=self.request_id,
            tenant_id=self.tenant_id,
            fingerprint=self.model.fingerprint,
            parts=[
                decode_pb2.TokenPart(token_ids=part.token_ids, chunk_id=part.chunk_id or b"")
                for part in self.prompt.parts
            ],
            mode=_MODES[self.mode],
            force_linked=self.force_linked,
            sampling=_sampling_message(self.sampling),
            prefill_hints=prefill_hints,
            resume=resume,
        )


def _sampling_message(sampling: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
    )
