"""Several samples in one stream: each is put together by itself, and none may have a gap."""

from __future__ import annotations

import pytest

from spolia.answers import Answer
from spolia.results import TokenLogprobs
from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import InternalError
from spolia_core.reuse import FinishReason


def delta(
    sample: int, index: int, ids: list[int], text: str, offset: int, logprobs: bool = False
) -> gateway_pb2.GenerateResponse:
    told = [common_pb2.TokenLogprobs(logprob=-0.5, top=[common_pb2.TopLogprob(token_id=i, logprob=-0.5)]) for i in ids]
    return gateway_pb2.GenerateResponse(
        delta=common_pb2.TokenDelta(
            token_index=index,
            token_ids=ids,
            text=text,
            text_offset=offset,
            sample_index=sample,
            logprobs=told if logprobs else [],
        )
    )


def finish(*counts: int) -> gateway_pb2.GenerateResponse:
    samples = [
        common_pb2.SampleFinish(reason=common_pb2.FINISH_REASON_LENGTH, num_generated_tokens=count) for count in counts
    ]
    return gateway_pb2.GenerateResponse(
        finish=common_pb2.Finish(
            reason=samples[0].reason, num_generated_tokens=sum(counts), num_prompt_tokens=3, samples=samples
        )
    )


def test_samples_that_come_by_turns_are_put_together() -> None:
    answer = Answer("r", 0.0)
    answer.add(delta(0, 0, [1], "a", 0, logprobs=True), 1.0)
    seen = answer.add(delta(1, 0, [7, 8], "xy", 0), 1.5)
    assert seen is not None
    assert (seen.sample_index, seen.token_ids) == (1, (7, 8))
    answer.add(delta(0, 1, [2], "b", 1, logprobs=True), 2.0)
    answer.add(finish(2, 2), 3.0)
    result = answer.result()
    assert [(s.text, s.token_ids, s.finish_reason) for s in result.samples] == [
        ("ab", (1, 2), FinishReason.LENGTH),
        ("xy", (7, 8), FinishReason.LENGTH),
    ]
    assert (result.text, result.token_ids, result.num_generated_tokens) == ("ab", (1, 2), 4)
    assert result.logprobs == (TokenLogprobs(-0.5, ((1, -0.5),)), TokenLogprobs(-0.5, ((2, -0.5),)))
    assert result.ttft_ms == 1000.0


@pytest.mark.parametrize(
    "messages",
    [
        [delta(1, 1, [1], "a", 0)],  # a token of the second sample is missing
        [delta(1, 0, [1], "a", 0), delta(1, 1, [2], "b", 0)],  # a letter came twice
        [delta(0, 0, [1], "a", 0), delta(1, 0, [1], "a", 0), finish(1, 2)],
        [delta(0, 0, [1], "a", 0), delta(2, 0, [1], "a", 0), finish(1, 1)],  # nobody asked for a third
    ],
)
def test_a_gap_in_any_sample_is_an_error(messages: list[gateway_pb2.GenerateResponse]) -> None:
    answer = Answer("r", 0.0)
    for message in messages[:-1]:
        answer.add(message, 1.0)
    with pytest.raises(InternalError, match="was due"):
        answer.add(messages[-1], 1.0)
