"""What a gateway keeps of each sample, so that another node goes on with all of them."""

from __future__ import annotations

import pytest

from spolia.v1.common_pb2 import Finish, SampleFinish, TokenDelta
from spolia_core.errors import InternalError
from spolia_gateway.received import Received


def taken() -> Received:
    received = Received(3)
    received.take(TokenDelta(sample_index=0, token_index=0, token_ids=[5], text="ab", text_offset=0))
    received.take(TokenDelta(sample_index=2, token_index=0, token_ids=[6, 7], text="", text_offset=0))
    received.take(TokenDelta(sample_index=2, token_index=2, token_ids=[8], text="c", text_offset=0))
    return received


def test_each_sample_is_resumed_where_it_stood() -> None:
    received = taken()
    resume = received.resume()
    assert resume is not None
    stood = [(list(sample.token_ids), sample.num_text_code_points) for sample in resume.samples]
    assert stood == [([5], 2), ([], 0), ([6, 7, 8], 1)]
    assert received.num_tokens == 4
    assert Received(2).resume() is None


@pytest.mark.parametrize(
    "bad",
    [
        TokenDelta(sample_index=3, token_index=0, token_ids=[1]),
        TokenDelta(sample_index=2, token_index=1, token_ids=[1]),
        TokenDelta(sample_index=1, token_index=0, token_ids=[1], text="x", text_offset=1),
    ],
)
def test_what_does_not_continue_is_never_passed_on(bad: TokenDelta) -> None:
    with pytest.raises(InternalError, match="was due"):
        taken().take(bad)


@pytest.mark.parametrize("counts", [(1, 0), (1, 1, 2), (2, 0, 3)])
def test_a_finish_that_counts_otherwise_is_refused(counts: tuple[int, ...]) -> None:
    finish = Finish(num_generated_tokens=4, samples=[SampleFinish(num_generated_tokens=count) for count in counts])
    with pytest.raises(InternalError, match="was due"):
        taken().check_complete(finish)
    taken().check_complete(
        Finish(num_generated_tokens=4, samples=[SampleFinish(num_generated_tokens=count) for count in (1, 0, 3)])
    )
