"""What an answer says, as the messages that carry it."""

from __future__ import annotations

from spolia.v1.common_pb2 import Finish, SampleFinish, TokenDelta
from spolia.v1.common_pb2 import FinishReason as FinishReasonPb
from spolia_decode.answering import Answering
from spolia_decode.job import GenerateJob
from spolia_engine.generation import Delta, Generation
from spolia_node.rpc_messages import report_to_pb


def delta_message(delta: Delta) -> TokenDelta:
    """New tokens."""
    message = TokenDelta()
    write_delta(delta, message)
    return message


def write_delta(delta: Delta, message: TokenDelta) -> None:
    """New tokens, into an empty message where it stands: to make it elsewhere and copy it takes twice the time."""
    message.token_index = delta.token_index
    message.token_ids.extend(delta.token_ids)
    message.text = delta.text
    message.text_offset = delta.text_offset
    message.sample_index = delta.sample_index
    for told in delta.logprobs:
        entry = message.logprobs.add(logprob=told.logprob)
        for token_id, logprob in told.top:
            entry.top.add(token_id=token_id, logprob=logprob)


def finish_message(job: GenerateJob, answering: Answering) -> Finish:
    """The end of an answer whose deltas have ended."""
    samples = [_sample_finish(generation) for generation in answering.generations]
    return Finish(
        reason=samples[0].reason,
        num_prompt_tokens=job.prompt.num_tokens,
        num_generated_tokens=sum(sample.num_generated_tokens for sample in samples),
        reuse=report_to_pb(answering.report),
        timings=answering.times.so_far(),
        seed=job.sampling.seed,
        samples=samples,
    )


def _sample_finish(generation: Generation) -> SampleFinish:
    assert generation.finish_reason is not None, "its deltas have ended"
    reason = FinishReasonPb.ValueType(generation.finish_reason)
    return SampleFinish(reason=reason, num_generated_tokens=len(generation.token_ids))
