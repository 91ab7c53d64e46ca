"""One generation, ready to be sent to any decode node that serves its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.prompt import Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_gateway.served_models import ModelKey
from spolia_node.rpc_messages import prompt_to_pb, sampling_to_pb

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
    cache_salt: str = ""

    @property
    def max_tokens(self) -> int:
        """Tokens it may come to: its prompt, and the longest answer of every sample."""
        return self.prompt.num_tokens + self.sampling.num_samples * self.sampling.max_tokens

    def message(
        self,
        prefill_hints: Sequence[str] = (),
        resume: decode_pb2.Resume | None = None,
        *,
        answer_stream: bytes = b"",
        answer_tag: int = 0,
    ) -> decode_pb2.DecodeServiceGenerateRequest:
        """The call to a decode node. `resume` makes it a replay; the others name the stream that carries the answer."""
        return decode_pb2.DecodeServiceGenerateRequest(
            request_id=self.request_id,
            tenant_id=self.tenant_id,
            fingerprint=self.model.fingerprint,
            parts=prompt_to_pb(self.prompt),
            mode=_MODES[self.mode],
            force_linked=self.force_linked,
            sampling=sampling_to_pb(self.sampling),
            prefill_hints=prefill_hints,
            resume=resume,
            num_sink_tokens=self.model.num_sink_tokens,
            cache_salt=self.cache_salt,
            answer_stream=answer_stream,
            answer_tag=answer_tag,
        )
