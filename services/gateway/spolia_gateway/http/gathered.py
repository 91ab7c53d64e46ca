"""Answers as they come: events of one prompt or several, and what they add up to."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from spolia.v1 import common_pb2, gateway_pb2
from spolia_gateway.http.logprob_tokens import Token, tokens_of

Responses = AsyncGenerator[gateway_pb2.GenerateResponse, None]


@dataclass(slots=True)
class Sample:
    """One answer."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    """With their log-probabilities; empty where those were not asked for."""
    reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


@dataclass(slots=True)
class Gathered:
    """Every sample of one prompt, and the finish."""

    samples: list[Sample]
    finish: common_pb2.Finish

    @classmethod
    def of(cls, num_samples: int) -> Gathered:
        """Nothing yet."""
        return cls([Sample() for _ in range(num_samples)], common_pb2.Finish())

    def take(self, response: gateway_pb2.GenerateResponse) -> None:
        """Adds an event."""
        if response.HasField("finish"):
            self.finish = response.finish
            for index, sample in enumerate(self.samples):
                sample.reason = reason_of(response.finish, index)
            return
        sample = self.samples[response.delta.sample_index]
        sample.texts.append(response.delta.text)
        sample.tokens += tokens_of(response.delta)


def reason_of(finish: common_pb2.Finish, sample_index: int) -> common_pb2.FinishReason.ValueType:
    """Why a sample ended. A node that knows of one sample only says it once."""
    return finish.samples[sample_index].reason if finish.samples else finish.reason
