"""Tokens with their log-probabilities, in the forms chat and completions give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from spolia.v1 import common_pb2
from spolia_gateway.token_texts import TokenTexts

LOWEST_LOGPROB = -9999.0
"""What an impossible token has: JSON knows no infinity."""


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token and how likely it was."""

    token_id: int
    logprobs: common_pb2.TokenLogprobs


def tokens_of(delta: common_pb2.TokenDelta) -> list[Token]:
    """The delta's tokens; none where their log-probabilities were not asked for."""
    return [Token(*pair) for pair in zip(delta.token_ids, delta.logprobs, strict=False)]


def chat_logprobs(tokens: Iterable[Token], texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    return {
        "content": [
            _entry(token.token_id, token.logprobs.logprob, texts)
            | {"top_logprobs": [_entry(top.token_id, top.logprob, texts) for top in token.logprobs.top]}
            for token in tokens
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """The `logprobs` of a completion's choice, chunk by chunk: each token's place counts on from the one before."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._num_code_points = 0

    def take(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The next tokens."""
        return {
            "tokens": [self._texts.name_of(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprobs.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._place(token.token_id) for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest, and the token itself."""
        top = [(likely.token_id, likely.logprob) for likely in token.logprobs.top]
        return {self._texts.name_of(i): _finite(p) for i, p in [*top, (token.token_id, token.logprobs.logprob)]}

    def _place(self, token_id: int) -> int:
        """Code points before the one the token begins in: a token may begin inside of one."""
        raw = self._texts.bytes_of(token_id)
        begun = sum(byte & 0xC0 != 0x80 for byte in raw)
        begins_inside = bool(raw) and raw[0] & 0xC0 == 0x80
        place = self._num_code_points - begins_inside
        self._num_code_points += begun
        return max(0, place)


def _entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    raw = texts.bytes_of(token_id)
    return {"token": texts.name_of(token_id), "bytes": list(raw), "logprob": _finite(logprob)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
