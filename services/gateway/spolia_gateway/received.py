"""What a client has been given of an answer: the point a replay continues from."""

from __future__ import annotations

from dataclasses import dataclass, field

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.errors import InternalError


@dataclass(slots=True)
class ReceivedSample:
    """Ids and text of one sample.

    Ids run ahead of text: a replay resends the ids, and the node that takes over derives again the text held back.
    """

    token_ids: list[int] = field(default_factory=list)
    num_code_points: int = 0

    def take(self, delta: common_pb2.TokenDelta) -> None:
        """Counts a delta in. Raises `InternalError` when it does not continue exactly where the last one ended."""
        if delta.token_ids:
            _check_continues(delta.token_index, len(self.token_ids), "token")
            self.token_ids.extend(delta.token_ids)
        if delta.text:
            _check_continues(delta.text_offset, self.num_code_points, "code point")
            self.num_code_points += len(delta.text)


class Received:
    """What came of the samples of one request, over all the nodes that worked on it."""

    def __init__(self, num_samples: int = 1) -> None:
        self.samples = [ReceivedSample() for _ in range(num_samples)]

    @property
    def empty(self) -> bool:
        """Whether the client has nothing yet; then a retry is no replay."""
        return not self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return sum(len(sample.token_ids) for sample in self.samples)

    def take(self, delta: common_pb2.TokenDelta) -> None:
        """Counts a delta in, before it goes to the client.

        Raises `InternalError` for a sample nobody asked for, and for a gap: a token lost or doubled is never passed on.
        """
        if delta.sample_index >= len(self.samples):
            _check_continues(delta.sample_index, len(self.samples) - 1, "sample")
        self.samples[delta.sample_index].take(delta)

    def check_complete(self, finish: common_pb2.Finish) -> None:
        """Raises `InternalError` when a finish counts other tokens than were received."""
        _check_continues(finish.num_generated_tokens, self.num_tokens, "token")
        if not finish.samples and len(self.samples) == 1:
            return  # a node that knows of one sample only
        _check_continues(len(finish.samples), len(self.samples), "sample")
        for told, sample in zip(finish.samples, self.samples, strict=True):
            _check_continues(told.num_generated_tokens, len(sample.token_ids), "token")

    def resume(self) -> decode_pb2.Resume | None:
        """What the next node must be told; None when it starts afresh."""
        if self.empty:
            return None
        return decode_pb2.Resume(
            samples=[
                decode_pb2.ResumedSample(token_ids=sample.token_ids, num_text_code_points=sample.num_code_points)
                for sample in self.samples
            ]
        )


def _check_continues(given: int, expected: int, what: str) -> None:
    if given != expected:
        raise InternalError(
            f"the decode node's answer goes on at {what} {given} where {expected} was due",
            field="delta",
            limit=str(expected),
            actual=str(given),
        )
