"""A prompt as tokens: an ordered list of live parts and chunk parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from spolia_core.errors import ContextTooLong, InvalidRequest


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive prompt tokens. With `chunk_id`, they are that local chunk; without, they are live tokens."""

    token_ids: tuple[int, ...]
    chunk_id: bytes | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """Parts, first to last. Positions count from 0 over all of them."""

    parts: tuple[Part, ...]

    @classmethod
    def live(cls, token_ids: Iterable[int]) -> Prompt:
        """A prompt of one live part."""
        return cls((Part(tuple(token_ids)),))

    @property
    def token_ids(self) -> list[int]:
        """All tokens, in order."""
        return list(chain.from_iterable(part.token_ids for part in self.parts))

    @property
    def num_tokens(self) -> int:
        """Length in tokens."""
        return sum(len(part.token_ids) for part in self.parts)

    def validate(self, *, vocab_size: int, max_context_tokens: int) -> None:
        """Raises `InvalidRequest` for an empty prompt or part, ids out of range, or no room for one more token."""
        if not self.parts:
            raise InvalidRequest("the prompt is empty", field="parts", limit="≥ 1 part", actual="0")
        for index, part in enumerate(self.parts):
            check_token_ids(part.token_ids, vocab_size, field=f"parts[{index}].token_ids")
        check_context_length(self.num_tokens, max_context_tokens)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, *, field: str) -> None:
    """Raises `InvalidRequest` when `token_ids` is empty or holds an id outside [0, vocab_size)."""
    if not token_ids:
        raise InvalidRequest(f"{field} is empty", field=field, limit="≥ 1 token", actual="0")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(
            f"{field} holds token id {bad}; this model has ids 0 … {vocab_size - 1}",
            field=field,
            limit=f"0 … {vocab_size - 1}",
            actual=str(bad),
        )


def check_context_length(num_prompt_tokens: int, max_context_tokens: int) -> None:
    """Raises `InvalidRequest`, with both numbers, unless the prompt leaves room for at least one token."""
    if num_prompt_tokens + 1 > max_context_tokens:
        raise ContextTooLong(
            f"the prompt has {num_prompt_tokens} tokens; this model's context is {max_context_tokens} tokens and "
            "must hold at least one more",
            field="parts",
            limit=f"{max_context_tokens} tokens",
            actual=f"{num_prompt_tokens} tokens",
        )


def check_answer_length(num_prompt_tokens: int, max_tokens: int, max_context_tokens: int) -> None:
    """Raises `InvalidRequest`, with the numbers, when prompt and longest answer together exceed the context."""
    room = max_context_tokens - num_prompt_tokens
    if max_tokens > room:
        raise ContextTooLong(
            f"the prompt's {num_prompt_tokens} tokens and max_tokens {max_tokens} exceed this model's context of "
            f"{max_context_tokens} tokens",
            field="sampling.max_tokens",
            limit=f"{room} behind this prompt",
            actual=str(max_tokens),
        )
