"""What one stream took, and what the streams of a round took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


class WrongAnswer(RuntimeError):
    """An answer that is not the one to be timed."""


@dataclass(frozen=True, slots=True)
class StreamTime:
    """Seconds on one clock: when the request was sent, its first token came, its end came.

    `node_ttft_ms` and `node_e2e_ms` are what the decode node says of the same request, on its own clock.
    """

    sent_s: float
    first_s: float
    end_s: float
    num_tokens: int
    node_ttft_ms: float
    node_e2e_ms: float

    def check(self, num_tokens: int) -> None:
        """Raises `WrongAnswer` for an answer of another length."""
        if self.num_tokens != num_tokens:
            raise WrongAnswer(f"an answer has {self.num_tokens} tokens, {num_tokens} were asked for")

    @property
    def ttft_ms(self) -> float:
        """To the first token."""
        return (self.first_s - self.sent_s) * 1e3

    @property
    def token_ms(self) -> float:
        """Of each token behind the first."""
        return (self.end_s - self.first_s) * 1e3 / (self.num_tokens - 1)

    @property
    def added_ttft_ms(self) -> float:
        """What was added to the node's own."""
        return self.ttft_ms - self.node_ttft_ms

    @property
    def added_token_ms(self) -> float:
        """What was added to the node's own; negative where tokens came closer together than they were made."""
        return self.token_ms - (self.node_e2e_ms - self.node_ttft_ms) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Medians over the answers of one round, and how many they are of."""

    num_answers: int
    ttft_ms: float
    token_ms: float
    added_ttft_ms: float
    added_token_ms: float

    def answer_ms(self, num_tokens: int) -> float:
        """Of a whole answer."""
        return self.ttft_ms + (num_tokens - 1) * self.token_ms

    @classmethod
    def of(cls, streams: Sequence[StreamTime]) -> RoundTime:
        """Of answers that were given at once."""
        return cls(
            len(streams),
            statistics.median(stream.ttft_ms for stream in streams),
            statistics.median(stream.token_ms for stream in streams),
            statistics.median(stream.added_ttft_ms for stream in streams),
            statistics.median(stream.added_token_ms for stream in streams),
        )
